"""List what is run: models, settings, and the tables whose rows they fill.

A setting is a method on a model; a cell is a setting with a seed, so one training and one evaluation.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from benchmarks.reproduce_paper import published
from benchmarks.runs import PAPER_GRPO, words
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.evaluation.protocol import SETS
from megatron_egrsd.report.family import NAMES


@dataclass(frozen=True)
class Model:
    """A model of the paper: `name` in tables and PUBLISHED, its configuration, and a published model of its sizes."""

    name: str
    config: str
    sizes: str


_8B = "examples/configs/qwen3_8b_cl_egrsd.yaml"
MODELS = {
    "4b": Model("Qwen3-4B", "examples/configs/qwen3_4b_cl_egrsd.yaml", "Qwen3-4B"),
    "8b": Model("Qwen3-8B", _8B, "Qwen3-8B"),
    "acereason": Model("AceReason-Nemotron-7B", _8B, "DeepSeek-R1-Distill-Qwen-7B"),
}


@dataclass(frozen=True)
class Setting:
    """A method on a model of MODELS; `options` are words of `megatron-egrsd train`, empty for the untrained model."""

    model: str
    name: str
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.model}/{self.name}"

    @property
    def trains(self) -> bool:
        return bool(self.options)


@dataclass(frozen=True)
class Cell:
    """A setting with a seed: of the data order, of sampling, and of the evaluation's samples."""

    setting: Setting
    seed: int

    @property
    def key(self) -> str:
        return f"{self.setting.key}/seed-{self.seed}"


@dataclass(frozen=True)
class TableRow:
    """A row: its label, the setting that fills it, and what the paper has there."""

    label: str
    setting: Setting
    paper: published.Row


@dataclass(frozen=True)
class Table:
    """A table of the paper; `note` says in what ours is another one."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    note: str = ""


_objective, _teacher = partial(words, "objective"), partial(words, "teacher")
_DUMPED = ("--dump_scores", "true")  # for Figure 4
# The baselines share the paper's trainer (its appendix B and Table A1): a frozen teacher for CRISP as well.
_SHARED = {
    "sft": (*_objective(preset="sft"), *words("rollout", max_response_tokens=16384), *words("data", bad_rows="skip")),
    "grpo": PAPER_GRPO,
    "opsd": _objective(preset="opsd"),
    "crisp": (*_objective(preset="crisp"), *_teacher(weights="frozen")),
}  # fmt: skip
TITLES = {"untrained": "untrained"} | {name: NAMES[name] for name in (*_SHARED, "egrsd", "cl_egrsd")}
# (gamma of EGRSD, gamma and W of CL-EGRSD): the paper's appendices E and I. AceReason's W is not stated; ours is 4B's.
_GATES = {"4b": (0.3, 0.3, 3), "8b": (0.3, 1.0, 5), "acereason": (0.5, 0.5, 3)}


def _egrsd(gamma: float, *more: str) -> tuple[str, ...]:
    return *_objective(preset="egrsd", attenuation=gamma), *more


def _cl_egrsd(gamma: float, window: int, *more: str) -> tuple[str, ...]:
    return *_objective(preset="cl_egrsd", attenuation=gamma, lookahead=window), *more


def methods(model: str) -> dict[str, Setting]:
    """Return the seven settings of the main comparison on `model`."""
    alone, gamma, window = _GATES[model]
    options = {"untrained": (), **_SHARED, "egrsd": _egrsd(alone), "cl_egrsd": _cl_egrsd(gamma, window, *_DUMPED)}
    return {name: Setting(model, name, tuple(words)) for name, words in options.items()}


def _main(key: str, number: str, model: str, columns: Iterable[str], note: str = "") -> Table:
    name = MODELS[model].name
    rows = (TableRow(TITLES[m], s, published.of_method(name, TITLES[m])) for m, s in methods(model).items())
    return Table(key, f"Table {number}: {name}", tuple(columns), tuple(rows), note)


def _gate(gamma: float, window: int) -> Setting:
    """Return the setting of a gate on 8B; the main comparison's own if it is one of its two."""
    found = methods("8b")
    alone, own, ahead = _GATES["8b"]
    if (gamma, window) in ((alone, 0), (own, ahead)):
        return found["cl_egrsd" if window else "egrsd"]
    if not gamma:
        return Setting("8b", "gate_off", _objective(preset="gate_off"))
    if not window:
        return Setting("8b", f"egrsd-g{gamma:g}", _egrsd(gamma))
    return Setting("8b", f"cl_egrsd-g{gamma:g}-w{window}", _cl_egrsd(gamma, window))


def _updates(name: str) -> Setting:
    """Return the setting of a teacher that changes, by its row of Table 7."""
    if name == "frozen":
        return _gate(0.3, 0)
    if name == "EMA 0.99":
        return Setting("8b", "egrsd-ema", _egrsd(0.3, *_teacher(weights="ema", ema_decay=0.99)))
    every = name.rpartition(" ")[2]
    return Setting("8b", f"egrsd-copy{every}", _egrsd(0.3, *_teacher(weights="snapshot", snapshot_every=every)))


def _tables() -> Iterable[Table]:
    sets, accuracy = tuple(SETS), (*SETS, "avg")
    yield _main("table2", "2", "4b", accuracy)
    yield _main("table3", "3", "8b", (*accuracy, "avg_len"), "Lengths: the paper's Table 6 and its text.")
    yield Table(
        "table4",
        "Table 4: attenuation γ on Qwen3-8B",
        ("avg",),
        tuple(TableRow(f"γ {gamma:g}", _gate(gamma, 0), {"avg": value}) for gamma, value in published.TABLE_4.items()),
        "After the last step, which is the paper's snapshot S4; S1 to S3 are not evaluated.",
    )
    yield _main("table5", "5", "4b", published.SUMMARY)
    yield Table(
        "table6",
        "Table 6: lookahead W on Qwen3-8B",
        (*accuracy, "avg_len"),
        tuple(TableRow(f"W {w}", _gate(1.0 if w == 5 else 0.3, w), row) for w, row in published.TABLE_6.items()),
        "γ is 0.3, but 1.0 for W 5: the paper's row of W 5 has the numbers of its CL-EGRSD in Table 3.",
    )
    yield Table(
        "table7",
        "Table 7: updates of the teacher, EGRSD on Qwen3-8B",
        accuracy,
        tuple(TableRow(name, _updates(name), row) for name, row in published.TABLE_7.items()),
    )
    yield Table(
        "tableA3",
        "Table A3: γ and W on Qwen3-8B",
        tuple(name for name in sets if name in published.TABLE_A3[1.0, 5]),
        tuple(TableRow(f"γ {g:g}, W {w}", _gate(g, w), row) for (g, w), row in published.TABLE_A3.items()),
    )
    yield _main("tableA4", "A4", "acereason", (*accuracy, "avg_len"),
                "The paper has no EGRSD here, and does not state W; ours is 3.")  # fmt: skip


TABLES = tuple(_tables())


def chosen(patterns: list[str], models: Iterable[str]) -> list[Setting]:
    """Return the settings on `models` of which a pattern matches TABLE/MODEL/METHOD or MODEL/METHOD, each once.

    No pattern means all. The main comparison comes first. Raises BadArgument for a pattern that matches nothing.
    """
    names: dict[Setting, list[str]] = {s: [s.key] for model in MODELS for s in methods(model).values()}
    for table in TABLES:
        for row in table.rows:
            names.setdefault(row.setting, [row.setting.key]).append(f"{table.key}/{row.setting.key}")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for found in names.values() for name in found):
            every = ", ".join(s.key for s in names)
            raise BadArgument(f"no cell is called {pattern!r}; they are {every}, or behind a table: table3/8b/egrsd")
    wanted = patterns or ["*"]
    here = set(models)
    return [
        setting
        for setting, found in names.items()
        if setting.model in here and any(fnmatchcase(name, pattern) for name in found for pattern in wanted)
    ]
