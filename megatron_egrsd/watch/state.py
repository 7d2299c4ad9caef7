"""The state of a run as its files tell it, without a word to the run itself."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_egrsd.config import Config
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.dump_files import dump_step, dumps_in
from megatron_egrsd.data.samples import load_rollouts
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.report.runs import Run, read_run, value
from megatron_egrsd.report.scored_dump import full_colour, load_scores
from megatron_egrsd.run.health import Health
from megatron_egrsd.system.files import is_empty, is_locked

_CANDIDATES = 16  # scored rollouts of a dump among which the sample is chosen
_PATIENCE = 120.0  # seconds of silence, at least, after which a run without a lock on this machine counts as silent
SHADES = 10  # of a token's colour, as on the token page

Stage = Literal["waiting", "running", "finished", "silent"]


@dataclass(frozen=True)
class ShownResponse:
    """A response of the newest dump. `shades` are the tokens' weights in SHADES steps, all 0 if nothing scored them."""

    step: int
    problem: str
    answer: str
    right: bool
    cut_off: bool
    pieces: list[str]
    tokens: int
    advantage: float | None = None
    weights: list[float] | None = None  # one a piece
    scale: float = 0.0  # the weight of the strongest shade

    @property
    def shades(self) -> list[int]:
        return [shade(weight, self.scale) for weight in self.weights or [0.0] * len(self.pieces)]


def shade(weight: float, scale: float) -> int:
    """Return the colour of a weight: 0 none, SHADES the strongest blue, -SHADES the strongest vermilion."""
    if not weight or not math.isfinite(weight) or scale <= 0:
        return 0
    return int(math.copysign(math.ceil(SHADES * min(1.0, abs(weight) / scale) - 1e-9), weight))


@dataclass(frozen=True)
class State:
    """The known state of a run. `written` is the time of its last sign of life, in seconds since 1970."""

    run: Run
    stage: Stage
    total_steps: int  # 0 if there is no configuration yet
    warnings: list[str]  # those that hold at the last step
    sample: ShownResponse | None
    written: float

    @property
    def step(self) -> int:
        return self.run.steps[-1]["step"] if self.run.steps else 0

    @property
    def seconds(self) -> list[float]:
        """The times of the steps."""
        return [s for row in self.run.steps if math.isfinite(s := value(row, "time/step"))]


class Reader:
    """Reader of the state of one output directory, again and again; a file that has not changed is not read twice."""

    def __init__(self, output: Path):
        self.output = output
        self.seen: dict[str, tuple[object, object]] = {}  # by part: signature of its file, its content
        _check(output)

    def read(self) -> State:
        """Return the state now. Raises BadArgument, naming file and line, if a file of the run cannot be read."""
        output = self.output
        metrics, settings = output / "metrics.jsonl", output / "config.yaml"
        run = self._cached("run", [metrics, settings], lambda: read_run(output, begun=False))
        config = self._cached("config", [settings], lambda: _config(settings))
        warnings = self._cached("warnings", [metrics, settings], lambda: _warnings(run, config))
        dump = _newest_dump(output)
        sample = self._cached("sample", [dump], lambda: _sample(dump)) if dump else None
        written = max((_changed(path) for path in (metrics, settings, output)), default=0.0)
        total = config.steps if config else 0
        return State(run, _stage(run, total, output, written), total, warnings, sample, written)

    def _cached(self, name: str, files: list[Path], read):
        signature = [(path, _signature(path)) for path in files]
        if name not in self.seen or self.seen[name][0] != signature:
            self.seen[name] = signature, read()
        return self.seen[name][1]


def _check(output: Path) -> None:
    if not output.exists():
        raise BadArgument(f"{output} does not exist; give the directory of a run (the `output` of its config)")
    if not output.is_dir():
        raise BadArgument(f"{output} is a file; give the directory of a run (the `output` of its config)")
    if any((output / name).exists() for name in ("metrics.jsonl", "config.yaml", ".lock")) or is_empty(output):
        return
    runs = sorted(path.parent.name for path in output.glob("*/metrics.jsonl"))
    hint = f"; it holds the runs {', '.join(runs[:5])}: give one of them" if runs else ""
    raise BadArgument(f"{output} is no output of a run: it has neither config.yaml nor metrics.jsonl{hint}")


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _changed(path: Path) -> float:
    signature = _signature(path)
    return signature[0] / 1e9 if signature else 0.0


def _config(path: Path) -> Config | None:
    """Return the configuration, None if it is missing, of another version, or still being written."""
    try:
        return parse_config(["--config", str(path)]) if path.is_file() else None
    except BadArgument:
        return None


def _warnings(run: Run, config: Config | None) -> list[str]:
    """Return the warnings of health.py that hold at the last step."""
    if config is None or not run.steps:
        return []
    health, holding = Health(config), {}
    for row in run.steps:
        holding = health.holding(row)
    return list(holding.values())


def _newest_dump(output: Path) -> Path | None:
    """Return the dump of the newest step; scores are better than rollouts, because they colour the tokens."""
    found = [*dumps_in(output / "scores").values(), *dumps_in(output / "rollouts").values()]
    return max(found, key=lambda path: (dump_step(path), path.parent.name), default=None)


def _sample(dump: Path) -> ShownResponse | None:
    """Return the first rollout of the dump with an advantage, else its first; None if the dump cannot be read."""
    try:
        return _scored(dump) if dump.parent.name == "scores" else _unscored(dump)
    except BadArgument:
        return None


def _scored(dump: Path) -> ShownResponse:
    scored = load_scores(dump, _CANDIDATES)
    chosen = next((r for r in scored if r.advantage and r.response_ids), scored[0])
    return ShownResponse(
        chosen.step, chosen.problem.problem, chosen.problem.answer, chosen.right, chosen.finish_reason == "length",
        chosen.pieces, len(chosen.response_ids), chosen.advantage, chosen.weight.tolist(),
        full_colour(r.weight for r in scored),
    )  # fmt: skip


def _unscored(dump: Path) -> ShownResponse | None:
    rollouts = load_rollouts(dump, 1)
    if not rollouts:
        return None
    r, step = rollouts[0], dump_step(dump)
    problem, cut_off = r.prompt.problem, r.finish_reason == "length"
    return ShownResponse(step, problem.problem, problem.answer, r.right, cut_off, [r.text], len(r.response_ids))


def _stage(run: Run, total: int, output: Path, written: float) -> Stage:
    if is_locked(output):
        return "running"
    step = run.steps[-1]["step"] if run.steps else 0
    if total and step >= total:
        return "finished"
    if not run.steps and not run.evaluations and not (output / "config.yaml").is_file():
        return "waiting"
    # It may run on another machine, where its lock is not seen.
    times = [s for row in run.steps[-10:] if math.isfinite(s := value(row, "time/step"))]
    patience = max(_PATIENCE, 5 * max(times, default=0.0))
    return "running" if time.time() - written < patience else "silent"
