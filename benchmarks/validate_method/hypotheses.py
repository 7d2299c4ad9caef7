"""The comparisons: settings, tasks, seeds, and the hypotheses, which were written down before the first run."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from benchmarks.runs import PAPER_GRPO, words
from megatron_egrsd.report.family import NAMES

STEPS = 20
CONFIG = "examples/validation/study.yaml"
EVALUATED = 16  # held-out responses to each problem, as in CONFIG
MARGIN = 0.02  # in held-out accuracy: equivalence is claimed within it


@dataclass(frozen=True)
class Setting:
    """An objective on a task; `options` are words of `megatron-egrsd train`'s command line."""

    name: str
    seeds: int
    options: tuple[str, ...]


_objective, _teacher, _rollout = (partial(words, section) for section in ("objective", "teacher", "rollout"))
_WARM_UP = _objective(advantage_warmup=5)  # that of CONFIG, which a preset behind CONFIG resets


def _preset(name: str, **values: object) -> tuple[str, ...]:
    return *_objective(preset=name, **values), *_WARM_UP


FAMILY = {"grpo": (*PAPER_GRPO, *_WARM_UP)} | {name: _preset(name) for name in ("gate_off", "egrsd", "cl_egrsd")}
TITLES = {name: NAMES[name] for name in FAMILY}

TINY, DOUBTING = "tiny", "doubting/wrong"
# A model whose teacher is unsure where its reference is wrong, and training data half of whose references are.
_DOUBTING = (*words("model", path="examples/validation/model"),
             *words("data", train="examples/validation/train_wrong_references.jsonl"))  # fmt: skip

_MAIN_SEEDS, _SEEDS = 14, 8  # power.py and docs/measurements/results.md say why
# CL-EGRSD's or EGRSD's words with others behind them, by the number of the hypothesis. The paper's EMA 0.99 and its
# copies every 20 of 100 steps are scaled to runs of a fifth of its length.
_CHANGED = {
    "egrsd, gamma 1": _preset("egrsd", attenuation=1),  # 2
    "cl_egrsd, W 5": _preset("cl_egrsd", lookahead=5),
    "cl_egrsd, gamma 1, W 5": _preset("cl_egrsd", attenuation=1, lookahead=5),
    "cl_egrsd, live teacher": _teacher(weights="live"),  # 3
    "cl_egrsd, EMA teacher": _teacher(weights="ema", ema_decay=0.95),
    "cl_egrsd, snapshot teacher": _teacher(weights="snapshot", snapshot_every=4),
    "cl_egrsd, quantile": _objective(entropy_normalization="quantile", entropy_floor=0.5),  # 4
    "cl_egrsd, mix 0.5": _objective(mix=0.5),
    "cl_egrsd, group advantage": (*_objective(advantage="group"),
                                  *_rollout(prompts_per_step=8, rollouts_per_prompt=8)),  # 5
    "cl_egrsd, no length bonus": _objective(length_bonus=0),  # 6
}  # fmt: skip


def settings(own: str = "") -> list[Setting]:
    """Return every setting; a run is a setting with a seed. `own` is the import path of an objective to compare too."""
    found = [Setting(f"{TINY}/{name}", _MAIN_SEEDS, options) for name, options in FAMILY.items()]
    found += [Setting(f"{DOUBTING}/{name}", _SEEDS, _DOUBTING + options) for name, options in FAMILY.items()]
    found += [Setting(f"{TINY}/{name}", _SEEDS, options) for name, options in _CHANGED.items()]
    if own:
        found.append(Setting(_own(own), _SEEDS, _objective(function=own)))
    return found


def _own(path: str) -> str:
    return f"{TINY}/cl_egrsd, {path.rpartition(':')[2]}"


Expected = Literal["higher", "equal", "shorter"]


@dataclass(frozen=True)
class Comparison:
    """A paired comparison by seed, `treatment` - `control`, of a hypothesis; Holm's correction runs over `family`.

    The hypothesis expects the treatment's accuracy to be higher, or equal within MARGIN, or its responses shorter.
    """

    family: str
    name: str
    treatment: str
    control: str
    expected: Expected


def comparisons(own: str = "") -> list[Comparison]:
    """Return the comparisons of every hypothesis, and that of an objective of one's own with CL-EGRSD."""
    tiny, found = f"{TINY}/cl_egrsd", []
    for family, task in (("1, tiny", TINY), ("1, doubting", DOUBTING)):
        found += [
            Comparison(family, f"{TITLES[ours]} against {TITLES[other]}", f"{task}/{ours}", f"{task}/{other}", "higher")
            for ours in ("egrsd", "cl_egrsd")
            for other in ("gate_off", "grpo")
        ]
    found += [
        Comparison("2", "gamma 0.3 against 1.0 at W 0", f"{TINY}/egrsd", f"{TINY}/egrsd, gamma 1", "higher"),
        Comparison("2", "gamma 1.0 against 0.3 at W 5", f"{tiny}, gamma 1, W 5", f"{tiny}, W 5", "higher"),
        *(Comparison("3", f"frozen teacher against {name}", tiny, f"{tiny}, {name} teacher", "higher")
          for name in ("live", "EMA", "snapshot")),
        Comparison("4", "batch maximum against quantile", tiny, f"{tiny}, quantile", "equal"),
        Comparison("4", "whole magnitude against mix 0.5", tiny, f"{tiny}, mix 0.5", "equal"),
        Comparison("5", "running against group advantage", tiny, f"{tiny}, group advantage", "equal"),
        Comparison("6", "length bonus against none", tiny, f"{tiny}, no length bonus", "shorter"),
    ]  # fmt: skip
    if own:
        name = own.rpartition(":")[2]
        found.append(Comparison("yours", f"{name} against CL-EGRSD", _own(own), tiny, "equal"))
    return found
