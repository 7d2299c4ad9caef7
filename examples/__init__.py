"""Configurations, scripts and small tasks to run: README.md of the repository and docs/guides explain them."""
