"""Everything that touches megatron-core: parallel state, Qwen3, scoring, the training step, weights in and out."""

from megatron_egrsd.engine import cpu

cpu.install()  # before the first import of megatron.core; does nothing where CUDA is available
