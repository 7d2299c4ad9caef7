"""How fast a step was: tokens a second, and the share of the devices' peak that its operations reach."""

import torch

from megatron_egrsd.config import Config
from megatron_egrsd.planning.machines import peak_flops
from megatron_egrsd.system import torchrun


def known_peak(config: Config) -> float:
    """Return the FLOP/s of all training ranks in the type of `config`; 0 if the peak of their device is not known."""
    if config.model.dtype != "bfloat16" or not torch.cuda.is_available():
        return 0.0
    return torchrun.world_size() * peak_flops(torch.cuda.get_device_name())


def throughput(metrics: dict[str, float], peak: float) -> dict[str, float]:
    """Return the metrics perf/... of a step with these other metrics, on devices of `peak` FLOP/s; 0: not known."""
    found = {"perf/tokens_per_second": metrics["batch/tokens"] / metrics["time/step"]}
    if peak:
        seconds = metrics["time/score"] + metrics["time/train"]
        found["perf/mfu"] = metrics["perf/model_flops"] / (seconds * peak)
    return found
