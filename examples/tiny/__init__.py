"""`make demo`: a tiny model and its arithmetic, made from nothing (README.md)."""
