"""The comparisons: settings, tasks, seeds, and the hypotheses, which were written down before the first run."""

from dataclasses import dataclass

STEPS = 20
_OWN = "examples/validation/objectives.py"


@dataclass(frozen=True)
class Setting:
    """An objective on a task; `options` are words of `megatron-egrsd train`'s command line."""

    name: str
    seeds: int
    options: tuple[str, ...]


def _words(prefix: str = "", **values) -> tuple[str, ...]:
    return tuple(word for key, value in values.items() for word in (f"--{prefix}{key}", str(value)))


def _objective(**values) -> tuple[str, ...]:
    return _words("objective.", **values)


GRPO = _objective(mix=0, attenuation=0, lookahead=0)
RLSD = _objective(attenuation=0, lookahead=0)
EGRSD = _objective(lookahead=0)
CL_EGRSD = ()
SHUFFLED = _objective(lookahead=0, function=f"{_OWN}:ShuffledGate")
OPSD = _objective(function="examples/extending/opsd.py:OPSD")
WRONG = _words("data.", train="examples/validation/train_wrong_references.jsonl")
ANSWER_ONLY = ("--data.teacher_template", "{problem}\nref:{answer}")

CONFIG = "examples/validation/study.yaml"
DOUBTING = _words("model.", path="examples/validation/model")
FAMILY = {"grpo": GRPO, "rlsd": RLSD, "egrsd": EGRSD, "cl_egrsd": CL_EGRSD}


def settings(own: str = "") -> list[Setting]:
    """Every setting; a run is a setting with a seed. `own` is the import path of an objective to compare as well."""
    # To tell the family apart takes more seeds than to tell it from GRPO; with fewer than ten pairs the exact test
    # could not get below 5 % after the correction.
    found = [Setting(f"tiny/{name}", 10 if name == "grpo" else 16, options) for name, options in FAMILY.items()]
    found.append(Setting("tiny/opsd", 5, OPSD))
    found.append(Setting("doubting/grpo", 5, DOUBTING + GRPO))  # it reads no reference
    for name, options in {"rlsd": RLSD, "egrsd": EGRSD, "shuffled": SHUFFLED}.items():
        found.append(Setting(f"doubting/{name}", 8, DOUBTING + options))
        found.append(Setting(f"doubting/{name}/wrong", 8, DOUBTING + options + WRONG))
    ablations = {
        "attenuation=0.5": _objective(attenuation=0.5),
        "lookahead=4": _objective(lookahead=4),
        "lookahead=8": _objective(lookahead=8),
        "lookahead mean": _objective(function=f"{_OWN}:LookaheadMean"),
        "entropy by maximum": _objective(entropy_normalization="sequence_max"),
        "entropy by ln(vocabulary)": _objective(entropy_normalization="log_vocab"),
        "frozen teacher": _words("teacher.", weights="frozen"),
        "EMA teacher": _words("teacher.", weights="ema", ema_decay=0.9),
        "outcome direction": _objective(advantage="outcome"),
    }
    found += [Setting(f"tiny/cl_egrsd, {name}", 5, options) for name, options in ablations.items()]
    if own:
        found.append(Setting(f"tiny/cl_egrsd, {own.rpartition(':')[2]}", 5, _objective(function=own)))
    found.append(Setting("doubting/egrsd, answer only", 5, DOUBTING + EGRSD + ANSWER_ONLY))
    return found


@dataclass(frozen=True)
class Hypothesis:
    """A paired comparison by seed: `treatment` - `control`; or, with `minus`, the difference of two of those."""

    name: str
    treatment: str
    control: str
    minus: tuple[str, str] | None = None
    margin: float | None = None  # in held-out accuracy: equivalence is claimed within it


MARGIN = 0.02
TITLES = {"grpo": "GRPO", "rlsd": "RLSD", "egrsd": "EGRSD", "cl_egrsd": "CL-EGRSD", "shuffled": "shuffled gate"}
HYPOTHESES = [
    *(Hypothesis(f"{TITLES[n]} beats GRPO", f"tiny/{n}", "tiny/grpo") for n in ("rlsd", "egrsd", "cl_egrsd")),
    Hypothesis("EGRSD equals RLSD", "tiny/egrsd", "tiny/rlsd", margin=MARGIN),
    Hypothesis("CL-EGRSD equals RLSD", "tiny/cl_egrsd", "tiny/rlsd", margin=MARGIN),
    Hypothesis("CL-EGRSD equals EGRSD", "tiny/cl_egrsd", "tiny/egrsd", margin=MARGIN),
    Hypothesis(
        "EGRSD gains on RLSD where half of the references are wrong",
        "doubting/egrsd/wrong",
        "doubting/rlsd/wrong",
        minus=("doubting/egrsd", "doubting/rlsd"),
    ),
    Hypothesis("the gate's place matters, not only its size", "doubting/egrsd/wrong", "doubting/shuffled/wrong"),
]
