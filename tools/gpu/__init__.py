"""A session on a GPU machine without network: docs/guides/gpu.md."""
