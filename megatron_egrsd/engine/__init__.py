"""Everything that touches megatron-core: parallel state, Qwen3, scoring, the training step, weights in and out."""

import logging
import warnings

from megatron_egrsd.engine import cpu

# megatron-core says at every import which fused parts are not installed; `megatron-egrsd doctor` says it once, in full.
warnings.filterwarnings("ignore", module=r"megatron\.core")
# It also announces at every start that GPTModel will give way to HybridModel, which has no output_processor yet.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
cpu.install()  # before the first import of megatron.core; does nothing where CUDA is available
