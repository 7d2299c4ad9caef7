"""The validation study: which objectives are compared, on what, with how many seeds; and what comes out of it.

`bash examples/validate_method.sh` runs it; docs/measurements/results.md is its result.
"""
