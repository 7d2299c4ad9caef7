"""Constants of the machine from the steps of run A, and the times that they predict for the other runs.

    python -m benchmarks.step_time RUN_A RUN_B ...

The runs need `--dump_rollouts true`, the same model and the same layout; batch, lengths and micro-batches may differ.
The terms of planning/step_time.py are fitted: a decoding step's fixed cost and its cost a sequence, the rate of matrix
products and a micro-batch's fixed cost, for scoring and training apart, and the seconds of a sync. Other load on the
machine only ever adds time: the constants come from the faster half of the steps, the last column is the quartile.
"""

import sys
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.measure import table
from benchmarks.runs import metrics
from megatron_egrsd.config import Config
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.dump_files import dumps_in
from megatron_egrsd.data.packing import schedule
from megatron_egrsd.data.samples import Rollout, load_rollouts
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.operations import forward_flops, head_flops
from megatron_egrsd.objectives.interface import is_trained, rollout_advantages
from megatron_egrsd.planning.step_time import generate_seconds

PHASES = ("generate", "score", "train", "sync")


def check(runs: list[Path]) -> None:
    """Print measured and predicted seconds of each phase of each run. Raises BadArgument if a run lacks its records."""
    if not runs:
        raise BadArgument("give run directories: the first one to take the constants from, the others to predict")
    terms, seconds = zip(*(_read(run) for run in runs), strict=True)
    constants = c = {phase: _fit(terms[0][phase], seconds[0][phase]) for phase in PHASES}
    print(
        f"{runs[0]}: a decoding step {c['generate'][0] * 1e3:.2f} ms + {c['generate'][1] * 1e6:.0f} us a sequence; "
        f"scoring {1e-9 / c['score'][0]:.1f} GFLOP/s + {c['score'][1] * 1e3:.0f} ms a micro-batch; "
        f"training {1e-9 / c['train'][0]:.1f} GFLOP/s + {c['train'][1] * 1e3:.0f} ms\n"
    )
    rows = []
    for run, features, measured in zip(runs, terms, seconds, strict=True):
        for phase in PHASES:
            predicted, found = features[phase] @ constants[phase], measured[phase]
            ratio = np.quantile(found / predicted, 0.25)
            times = f"{median(predicted):.2f} s", f"{median(found):.2f} s"
            rows.append([run.name, len(found), phase, *times, f"{ratio:.2f}"])
    print(table(["run", "steps", "phase", "predicted", "measured", "measured / predicted, lower quartile"], rows))


def _read(run: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return terms [steps, n] and seconds [steps] of each phase. The first step, which warms up, is left out."""
    files = dict(list(dumps_in(run / "rollouts").items())[1:])  # by step
    if not (run / "config.yaml").is_file() or not files:
        raise BadArgument(f"{run} is no run of two steps or more with --dump_rollouts true")
    config = parse_config(["--config", str(run / "config.yaml")])
    arch = Architecture.from_pretrained(config.model.path)
    by_step = {row["step"]: row for row in metrics(run) if all(f"time/{phase}" in row for phase in PHASES)}
    whole = [step for step in files if step in by_step]  # a stop cuts one short
    steps = [_terms(load_rollouts(files[step]), config, arch) for step in whole]
    measured = [by_step[step] for step in whole]
    return (
        {phase: np.array([step[phase] for step in steps]) for phase in PHASES},
        {phase: np.array([row[f"time/{phase}"] for row in measured]) for phase in PHASES},
    )


def _terms(rollouts: list[Rollout], config: Config, arch: Architecture) -> dict[str, list[float]]:
    """Return the factors of each phase's constants, for one step on one data-parallel rank."""
    from megatron_egrsd.objectives.load import load_objective

    # Without the history of earlier steps: what counts is which rollouts have a signal, and with one all have.
    objective = load_objective(config.objective)
    _, advantage = rollout_advantages(rollouts, objective, config.rollout.max_response_tokens)
    trained = [r for r, a in zip(rollouts, advantage, strict=True) if is_trained(a, objective)]
    responses = [len(r.response_ids) for r in rollouts]
    slots = min(config.rollout.servers.max_concurrent_requests, len(responses))
    decoding = [generate_seconds(step, responses, 0, slots) for step in (lambda n, _: 1.0, lambda n, _: float(n))]
    teachers = [len(r.prompt.teacher_ids) + len(r.response_ids) for r in rollouts]
    students = [len(r.prompt.student_ids) + len(r.response_ids) for r in trained]
    rows = sum(len(r.response_ids) for r in trained)
    budget = config.parallel.max_tokens_per_microbatch
    scored = forward_flops(arch, teachers) + head_flops(arch, sum(responses))
    updated = 3 * (forward_flops(arch, students) + head_flops(arch, rows))
    return {
        "generate": decoding,
        "score": [scored, len(schedule([teachers], budget)[0])],
        "train": [updated, len(schedule([students], budget)[0]) if students else 0],
        "sync": [1.0],
    }


def _fit(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Fit constants [n] >= 0 by least squares over the half of the steps that other load has disturbed least."""
    kept = np.arange(len(seconds))
    for _ in range(5):
        constants = np.linalg.lstsq(terms[kept], seconds[kept], rcond=None)[0]
        if (constants < 0).any():  # too few different steps to tell the terms apart: the first one alone
            constants = np.zeros(terms.shape[1])
            constants[0] = median(seconds[kept] / terms[kept, 0])
        kept = np.argsort(seconds / (terms @ constants))[: max(2, len(seconds) // 2)]
    return constants


if __name__ == "__main__":
    try:
        check([Path(run) for run in sys.argv[1:]])
    except BadArgument as error:
        sys.exit(f"step_time: error: {error}")
