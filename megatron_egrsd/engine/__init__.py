"""Everything that touches megatron-core: parallel state, the model, scoring, the training step, weights in and out."""

import importlib.util
import logging
import warnings

from megatron_egrsd.engine import cpu
from megatron_egrsd.errors import BadArgument

# megatron-core says at every import which fused parts are not installed; `megatron-egrsd doctor` says it once, in full.
warnings.filterwarnings("ignore", module=r"megatron\.core")
# It also announces at every start that GPTModel will give way to HybridModel, which has no output_processor yet.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
# And, at every save, that the way it saves itself (without nvidia-resiliency-ext) will go; at every load, that torch's
# ShardedTensor, which it uses, will.
logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").setLevel(logging.ERROR)
logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="Please use DTensor", category=FutureWarning)
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")
try:
    cpu.install()  # before the first import of megatron.core; does nothing if CUDA is available
    import megatron.core  # noqa: F401
except (RuntimeError, OSError) as error:
    if importlib.util.find_spec("transformer_engine") is None:
        raise
    # megatron-core imports it wherever it is installed, and takes nothing but an ImportError for an answer.
    raise BadArgument(
        f"transformer-engine is installed but cannot be loaded ({error}); install what it lacks, or uninstall it"
    ) from None
