"""Training sets from public data sets: one schema, without the problems of the evaluation sets."""
