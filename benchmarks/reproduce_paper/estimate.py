"""Estimate what cells take before any of them runs: hours by the planner's time of a step, and bytes on disk.

No GPU has been timed; docs/measurements/scaling.md says what the time of a step is made of.
"""

import functools
from dataclasses import dataclass

import torch

from benchmarks.measure import table
from benchmarks.reproduce_paper.cells import MODELS, Cell
from benchmarks.reproduce_paper.claim import holder
from benchmarks.reproduce_paper.site import Site
from megatron_egrsd.config import Config
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.evaluation.protocol import RUNS
from megatron_egrsd.hf.adapter_file import configured_spec
from megatron_egrsd.hf.adapters import trained_parameters
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.objectives.load import needs_rollouts, needs_teacher
from megatron_egrsd.planning.cluster import architecture, learning, sampling
from megatron_egrsd.planning.machines import Machine
from megatron_egrsd.planning.plan import checkpoint_bytes, readable
from megatron_egrsd.planning.step_time import Batch, step_seconds

# Set -> (problems, mean tokens of a response). The lengths are assumed; their mean is about the paper's AvgLen.
_SETS = {"aime24": (30, 16_000), "aime25": (30, 19_000), "hmmt25": (30, 21_000), "math500": (500, 5_500),
         "minerva": (272, 7_000), "gsm8k": (1319, 2_500)}  # fmt: skip
_SAMPLES = 4  # a problem
_PROMPT, _SOLUTION = 300, 1200  # tokens, assumed
_START = 300.0  # seconds from the start of a process to its first token, assumed
_DUMP_BYTES, _SAMPLE_BYTES = 130, 4  # a response token


@dataclass(frozen=True)
class Estimate:
    """Seconds of training and evaluation on the node's GPUs, and bytes that stay; both 0 for what is done."""

    state: str
    train: float = 0.0
    evaluate: float = 0.0
    disk: int = 0


def estimate(cell: Cell, site: Site, machine: Machine | None) -> Estimate:
    """Estimate what is left of a cell; without a machine only its disk. BadArgument if it fits nowhere."""
    if site.is_finished(cell):
        return Estimate("finished")
    config, arch = site.config(cell), _architecture(cell, site)
    lengths = {name: (problems * _SAMPLES * RUNS.get(name, 1), mean) for name, (problems, mean) in _SETS.items()}
    disk = _SAMPLE_BYTES * sum(count * mean for count, mean in lengths.values())
    train = evaluate = 0.0
    if cell.setting.trains:
        disk += _training_bytes(config, arch)
    if machine is not None:
        if not site.is_trained(cell):
            train = _START + config.steps * _step(config, arch, site.gpus, machine)
        responses = tuple(mean for count, mean in lengths.values() for _ in range(count))
        evaluate = _START + _sample(arch, machine, site.gpus, Batch(_PROMPT, 0, responses))
    return Estimate(_state(cell, site), train, evaluate, disk)


def _state(cell: Cell, site: Site) -> str:
    if held := holder(site.directory(cell)):
        return f"runs on {held}"
    if site.failure_of(cell):
        return "has failed"
    begun = site.run_of(cell).exists() or site.evaluation_of(cell).exists()
    return "begun" if begun else "to run"


def plan(cells: list[Cell], site: Site, machine: Machine | None) -> str:
    """Return a Markdown table of the cells, and their sums."""
    found = {cell: estimate(cell, site, machine) for cell in cells}
    rows = [
        [cell.key, e.state, _hours(e.train), _hours(e.evaluate), _hours(site.gpus * (e.train + e.evaluate)),
         readable(e.disk) if e.disk else "-"]
        for cell, e in found.items()
    ]  # fmt: skip
    train, evaluate = (sum(getattr(e, name) for e in found.values()) for name in ("train", "evaluate"))
    left = [cell for cell, e in found.items() if e.state != "finished"]
    disk = sum(e.disk for e in found.values())
    rows.append(["sum", f"{len(left)} of {len(cells)} to run", _hours(train), _hours(evaluate),
                 _hours(site.gpus * (train + evaluate)), readable(disk)])  # fmt: skip
    columns = ["cell", "state", "training, h", "evaluation, h", "GPU hours", "disk"]
    lines = [table(columns, rows, align="---"), ""]
    if machine is not None:
        lines.append(
            f"Hours on one node of {site.gpus} {machine.name}, calculated: no GPU has been timed, and lengths of "
            "responses and prompts, and the start of a process, are assumed."
        )
    merged = max((_architecture(cell, site).num_parameters for cell in left), default=0)
    lines.append(f"While a cell with adapters is evaluated, its merged model takes {readable(2 * merged)} more.")
    return "\n".join(lines)


def _architecture(cell: Cell, site: Site) -> Architecture:
    path = site.models.get(cell.setting.model)
    return architecture(str(path) if path else MODELS[cell.setting.model].sizes)


def _step(config: Config, arch: Architecture, gpus: int, machine: Machine) -> float:
    """Return the seconds of a step on a node, half of whose GPUs train and half sample, with every response cut off."""
    training = (gpus + 1) // 2
    live, spec = needs_rollouts(config.objective), configured_spec(config.lora)
    length = config.rollout.max_response_tokens if live else _SOLUTION
    batch = Batch(_PROMPT, _PROMPT + _SOLUTION, (length,) * config.rollout.rollouts_per_step)
    score, train, sync = learning(arch, machine, training, config.parallel, batch, spec)
    if not live:
        return train
    score = score if needs_teacher(config.objective) else 0.0
    return step_seconds(_sample(arch, machine, gpus - training, batch), score, train, sync, staleness=0)


@functools.cache
def _sample(arch: Architecture, machine: Machine, gpus: int, batch: Batch) -> float:
    if gpus < 1 or (found := sampling(arch, machine, gpus, batch)) is None:
        raise BadArgument(f"{gpus} GPUs of {machine.name} cannot sample responses of {max(batch.responses):,} tokens")
    return found[0]


def _training_bytes(config: Config, arch: Architecture) -> int:
    """Return the bytes of checkpoints, of the export and of dumps."""
    spec, itemsize = configured_spec(config.lora), getattr(torch, config.model.dtype).itemsize
    checkpoints = (config.checkpoint.keep + 1) * checkpoint_bytes(config, arch) if config.checkpoint.every else 0
    export = itemsize * trained_parameters(arch, spec)
    tokens = config.steps * config.rollout.rollouts_per_step * config.rollout.max_response_tokens
    return checkpoints + export + (_DUMP_BYTES * tokens if config.dump_scores else 0)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f}" if seconds else "-"
