"""The machine below a run: torchrun's variables, files, import paths. Imports nothing of the package but errors."""
