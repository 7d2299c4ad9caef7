"""Importing this module installs the adapter of verl: for VERL_USE_EXTERNAL_MODULES, which takes names of modules."""

from megatron_egrsd.vocab_parallel.adapters import verl

verl.install()
