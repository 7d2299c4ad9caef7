"""A user's objective in one file: found, tried, dumped and shown; the family behind the same interface."""

import ast
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_egrsd import objectives, weighting
from megatron_egrsd.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives.egrsd import evidence_ratio, magnitude
from megatron_egrsd.objectives.interface import Tokens, weigh
from megatron_egrsd.objectives.load import check_objective, load_objective, needs_teacher
from megatron_egrsd.objectives.signal import advantages
from megatron_egrsd.report.family import settings, title
from megatron_egrsd.report.scored_dump import load_scores, save_scores
from megatron_egrsd.report.token_page import page_data, render
from megatron_egrsd.run.agreement import facts
from tests.presets import preset_objective
from tests.unit.test_objective import configs
from tests.unit.test_scores import HISTORY, batch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "extending"
OPSD, HIGH_ENTROPY = f"{EXAMPLES / 'opsd.py'}:OPSD", f"{EXAMPLES / 'high_entropy.py'}:HighEntropy"


def packed(lengths=(3, 4), seed=0) -> Tokens:
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    names = ("teacher_log_prob", "teacher_entropy", "student_log_prob", "student_entropy")
    scores = {n: torch.rand(total, generator=g) * (-4 if "prob" in n else 3) for n in names}
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    signal = torch.tensor([(-1.5, 0.7, 0.0)[i % 3] for i in range(len(lengths))])
    return Tokens(cu_seqlens, signal.repeat_interleave(cu_seqlens.diff()), **scores)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**31), configs)
def test_the_weight_is_direction_times_magnitude_times_gate(lengths, seed, config):
    tokens, objective = packed(lengths, seed), load_objective(config)
    assert needs_teacher(config) == (config.mix > 0 or config.attenuation > 0)
    weight, fields = weigh(objective, tokens, vocab_size=100)
    ratio = evidence_ratio(tokens.advantage, tokens.teacher_log_prob, tokens.student_log_prob)
    m = magnitude(ratio, config.mix, config.ratio_clip)
    assert torch.equal(weight, tokens.advantage * m * fields["gate"] if needs_teacher(config) else tokens.advantage)
    if needs_teacher(config):
        assert torch.equal(objective.metrics(dataclasses.replace(tokens, fields=fields))["gate/mean"], fields["gate"])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_the_examples_are_short_and_work(path):
    assert len(path.read_text().splitlines()) < 100
    (name,) = re.findall(r"class (\w+)\(Objective\)", path.read_text())
    check_objective(ObjectiveConfig(function=f"{path}:{name}"))


@pytest.mark.parametrize("name", ["opsd.py", "distil_wrong.py"])
def test_the_documentation_shows_the_example_as_it_is(name):
    page = (ROOT / "docs" / "guides" / "extending.md").read_text()
    assert f"```python\n{(EXAMPLES / name).read_text()}```" in page


def test_the_commands_of_the_examples_train_what_they_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = {}
    for path in EXAMPLES.glob("*.py"):
        command = ast.get_docstring(ast.parse(path.read_text())).partition("megatron-egrsd train ")[2]
        found[path.stem] = parse_config(command.split())
        check_objective(found[path.stem].objective)
    grpo, config = preset_objective("grpo"), found["high_entropy"]
    assert config.objective == dataclasses.replace(grpo, function=config.objective.function, options={"share": 0.2})
    assert config.rollout.rollouts_per_prompt == 8 and config.rollouts_per_update == 128


def test_opsd_is_the_clipped_log_ratio_and_trains_every_rollout():
    opsd = load_objective(ObjectiveConfig(function=OPSD, options={"clip": 1.5}))
    tokens = packed()
    difference = (tokens.teacher_log_prob - tokens.student_log_prob).tolist()
    assert opsd.weight(tokens).tolist() == pytest.approx([max(-1.5, min(1.5, d)) for d in difference])
    assert opsd.advantages(torch.zeros(3), torch.zeros(3)).tolist() == [1, 1, 1]


def test_high_entropy_weighs_the_chosen_share_and_needs_no_teacher():
    config = ObjectiveConfig(function=HIGH_ENTROPY, options={"share": 0.25})
    objective, tokens = load_objective(config), packed((40, 60))
    assert not needs_teacher(config)
    w = objective.weight(dataclasses.replace(tokens, fields=objective.prepare(tokens, vocab_size=9)))
    kept = w != 0
    assert kept.sum() == 25 and tokens.student_entropy[kept].min() > tokens.student_entropy[~kept].max()
    assert torch.equal(w[kept], tokens.advantage[kept])


def test_function_and_options_on_the_command_line():
    words = ["--model.path", "a", "--data.train", "b", "--objective.function", OPSD, "--objective.options.clip", "2"]
    objective = parse_config(words).objective
    assert (objective.function, objective.options) == (OPSD, {"clip": 2})
    assert load_objective(objective).clip == 2
    with pytest.raises(BadArgument, match=r"objective\.options are those of objective\.function"):
        ObjectiveConfig(options={"clip": 2})
    assert title(objective) == "OPSD" and settings(objective).endswith("opsd.py, clip 2")


def test_a_module_of_the_path_will_do(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    assert type(load_objective(ObjectiveConfig(function="opsd:OPSD"))).__name__ == "OPSD"


def test_the_old_name_of_the_module_has_the_same_classes():
    assert weighting.Objective is objectives.Objective and weighting.Tokens is objectives.Tokens


HEAD = """\
from __future__ import annotations
from dataclasses import dataclass
import torch
from megatron_egrsd.objectives import Objective

@dataclass(frozen=True)
class Mine(Objective):
    scale: float = 1.0
"""


def weight(result: str) -> str:
    return f"{HEAD}    def weight(self, tokens):\n        return {result}\n"


BROKEN = {
    "no file": (None, "cannot be imported: FileNotFoundError"),
    "no Python": ("def", "cannot be imported: SyntaxError"),
    "no such class": ("", "cannot be imported: AttributeError"),
    "no objective": ("class Mine: pass", "is no subclass of"),
    "a function": ("def Mine(): pass", "is no subclass of"),
    "no weight": (HEAD, "Mine defines no weight"),
    "a mistake": (weight("tokens.nothing"), r"'nothing' \(mine.py, line 10\)"),
    "one number": (weight("tokens.advantage.mean()"), r"weight should be .* a tensor \[5\] here, and is a tensor \[\]"),
    "no tensor": (weight("1.0"), "is a float"),
    "not finite": (weight("tokens.advantage / 0"), "weight is not finite"),
    "the student too early": (
        HEAD + "    def prepare(self, tokens, **_): return {'x': tokens.student_entropy.exp()}",
        "'NoneType' object has no attribute 'exp'",
    ),
    "a signal a token": (HEAD + "    def advantages(self, *_): return torch.ones(5)", "one number a rollout"),
    "a metric without a group": (
        weight("tokens.advantage") + "    def metrics(self, tokens): return {'mine': tokens.advantage}",
        "a metric is called 'mine'",
    ),
    "prepare without the group": (
        HEAD + "    def prepare(self, tokens, *, vocab_size): return {}",
        r"prepare\(\) got an unexpected keyword argument 'group'$",
    ),
    "remember without the group": (
        weight("tokens.advantage") + "    def remember(self, tokens): return {}",
        r"remember\(\) got an unexpected keyword argument 'group'$",
    ),
    "a signal without a context": (
        weight("tokens.advantage") + "    def without_context(self, signal): return signal.sum()",
        "without_context should be one number a rollout",
    ),
    "contexts of no teacher": (
        weight("tokens.advantage") + "    needs_contexts, needs_teacher = True, False",
        "the contexts are the teacher's",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_work_is_refused_in_one_sentence(name, tmp_path):
    source, reason = BROKEN[name]
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(BadArgument, match=reason) as error:
        check_objective(ObjectiveConfig(function=f"{path}:Mine"))
    assert str(error.value).startswith("objective.function")


def test_ranks_with_other_versions_of_the_file_notice(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(weight("tokens.advantage"))
    config = Config(ModelConfig("m"), DataConfig("d"), ObjectiveConfig(function=f"{path}:Mine"))
    before = facts(config, [])
    path.write_text(weight("2 * tokens.advantage"))
    changed = facts(config, [])
    assert {name for name in before if before[name] != changed[name]} == {"code"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"clop": 1}, "has no option 'clop'; its options are clip"), ({"clip": -1}, "clip is -1"), ({"clip": "x"}, "'>'")],
)
def test_bad_options_are_refused(options, reason):
    with pytest.raises(BadArgument, match=re.escape(reason)):
        check_objective(ObjectiveConfig(function=OPSD, options=options))


def test_a_dump_is_read_and_shown_without_running_the_objective(tmp_path):
    """The file is gone when the page is made: it shows what was recorded, beside the family by the rewards."""
    path = tmp_path / "mine.py"
    path.write_text(weight("self.scale * tokens.teacher_log_prob"))
    objective = ObjectiveConfig(function=f"{path}:Mine", options={"scale": 2.0})
    save_scores(batch(objective), tmp_path / "s.jsonl")
    path.unlink()
    scored = load_scores(tmp_path / "s.jsonl")
    assert all(np.array_equal(r.weight, 2 * r.teacher_log_prob) and (r.gate == 1).all() for r in scored)

    data = page_data(scored, [0, 1])
    assert data["trained"] == "run" and [o["id"] for o in data["objectives"]][-1] == "run"
    rewards, groups = torch.tensor([r.shaped_reward for r in scored]), torch.tensor([r.group for r in scored])
    signal = advantages(rewards, groups, objective, HISTORY)
    for r, row, a in zip(scored, data["rollouts"], signal.tolist(), strict=True):
        weights = row["objectives"]
        assert weights["run"]["weight"] == pytest.approx(r.weight, abs=1e-4) and "w" not in weights["run"]
        assert weights["grpo"]["weight"] == pytest.approx(np.full(len(r.pieces), a), abs=1e-4)
    page = render(scored, "mine")
    assert "Mine (this run)" in page and "mine.py, scale 2.0" in page


def test_a_dump_of_an_objective_without_a_teacher(tmp_path):
    scored = batch(ObjectiveConfig(function=HIGH_ENTROPY), teacher=False)
    assert {float(g) for r in scored for g in r.gate} == {0.0, 1.0}
    data = page_data(scored, [0, 1])
    assert [o["name"] for o in data["objectives"]] == ["GRPO", "HighEntropy (this run)"]
