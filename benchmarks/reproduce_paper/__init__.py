"""The tables and figures of the EGRSD paper (arXiv 2605.13255): made again, and set beside the published numbers.

`bash examples/reproduce_paper.sh` runs it; docs/guides/reproduce.md explains it.
"""
