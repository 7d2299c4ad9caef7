"""The validation study: its arithmetic, its plan, its runner and its page (docs/measurements/results.md)."""

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks import measure, paired
from benchmarks.validate_method import __main__ as command
from benchmarks.validate_method import mechanism, power, record, results, run
from benchmarks.validate_method.hypotheses import CONFIG, EVALUATED, FAMILY, STEPS, Comparison, comparisons, settings
from megatron_egrsd import cli
from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.errors import BadArgument, RunError
from tests.presets import preset_objective

ROOT = Path(__file__).resolve().parents[2]

OWN = "examples/extending/high_entropy.py:HighEntropy"
exact = st.integers(-1024, 1024).map(lambda n: n / 1024)  # sums have no rounding, so equal values compare equal


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@given(st.lists(exact, min_size=2, max_size=9))
def test_sign_flip_is_the_exact_permutation_test(values):
    pairs = np.array(values)
    found = stats.permutation_test(
        (pairs,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert paired.sign_flip(pairs) == pytest.approx(found.pvalue, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_adjusts_as_defined(p_values):
    """The i-th smallest adjusted p is the largest of (m - j) p_(j) up to i, and order of the input does not matter."""
    adjusted, m = paired.holm(p_values), len(p_values)
    ordered = sorted(p_values)
    expected = [min(1.0, max((m - j) * ordered[j] for j in range(i + 1))) for i in range(m)]
    assert sorted(adjusted) == pytest.approx(expected)
    assert all(a >= p - 1e-15 for a, p in zip(adjusted, p_values, strict=True))


def test_difference_is_the_paired_t_interval():
    pairs = np.random.default_rng(0).normal(0.01, 0.02, 16)
    found, expected = paired.difference(pairs), stats.ttest_1samp(pairs, 0.0)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert (found.low90, found.high90) == pytest.approx(tuple(expected.confidence_interval(0.9)))
    assert found.within(1.0) and not found.within(0.001)


def test_every_comparison_is_of_settings_with_enough_seeds():
    found = {s.name: s for s in settings(OWN)}
    assert len(found) == len(settings(OWN)) and found["tiny/cl_egrsd, HighEntropy"].options[-1] == OWN
    compared = comparisons(OWN)
    assert {side for c in compared for side in (c.treatment, c.control)} == found.keys()  # none is trained for nothing
    for family, size in Counter(c.family for c in compared).items():
        members = [c for c in compared if c.family == family]
        pairs = min(min(found[c.treatment].seeds, found[c.control].seeds) for c in members)
        assert 2 / 2**pairs < 0.05 / size  # the smallest exact p passes Holm's first step
        assert pairs <= 20  # that sign_flip enumerates


def test_the_settings_are_the_papers_but_for_what_a_hypothesis_changes():
    configs = {s.name: parse_config(["--config", CONFIG, *s.options]) for s in settings()}
    expected = {name: preset_objective(name, advantage_warmup=5) for name in ("gate_off", "egrsd", "cl_egrsd")}
    ours = expected["cl_egrsd"]
    # The paper's GRPO is its trainer without a teacher.
    expected["grpo"] = replace(ours, preset="grpo", mix=0.0, attenuation=0.0, lookahead=0)
    for name, objective in expected.items():
        tiny, doubting = configs[f"tiny/{name}"], configs[f"doubting/wrong/{name}"]
        assert tiny.objective == doubting.objective == objective
        assert doubting.model.path != tiny.model.path and doubting.data.train != tiny.data.train
    changed: dict[str, ObjectiveConfig] = {
        "egrsd, gamma 1": replace(expected["egrsd"], attenuation=1.0),
        "cl_egrsd, W 5": replace(ours, lookahead=5),
        "cl_egrsd, gamma 1, W 5": replace(ours, attenuation=1.0, lookahead=5),
        "cl_egrsd, quantile": replace(ours, entropy_normalization="quantile", entropy_floor=0.5),
        "cl_egrsd, mix 0.5": replace(ours, mix=0.5),
        "cl_egrsd, group advantage": replace(ours, advantage="group"),
        "cl_egrsd, no length bonus": replace(ours, length_bonus=0.0),
    } | {f"cl_egrsd, {name} teacher": ours for name in ("live", "EMA", "snapshot")}
    others = {name for name in expected for name in (f"tiny/{name}", f"doubting/wrong/{name}")}
    assert configs.keys() - others == {f"tiny/{name}" for name in changed}
    for name, objective in changed.items():
        assert configs[f"tiny/{name}"].objective == objective
    teachers = Counter(c.teacher.weights for c in configs.values())
    assert teachers == {"frozen": 15, "live": 1, "ema": 1, "snapshot": 1}
    for name, config in configs.items():
        assert config.rollout.prompts_per_step * config.rollout.rollouts_per_prompt == 64
        assert (config.rollout.rollouts_per_prompt == 1) == ("group" not in name)
        assert config.optimizer.clip_grad == 0.1 and config.evaluation.rollouts_per_problem == EVALUATED
        assert config.steps == STEPS and config.objective.advantage_warmup < config.steps
        assert config.teacher.snapshot_every < config.steps or config.teacher.weights != "snapshot"


@pytest.mark.heavy
def test_the_command_accepts_every_run(tmp_path, capsys):
    for number, one in enumerate(r for r in run.runs_of(tmp_path, own=OWN) if r.seed == 0):
        arguments = [*one.words, "--output", str(tmp_path / str(number)), "--rollout.servers.urls", "['http://a:1']"]
        assert cli.main(["train", *arguments, "--dry-run"]) == 0, capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_power_is_that_of_simulated_studies():
    random, effect, deviation, pairs, level = np.random.default_rng(0), 0.03, 0.025, 8, 0.05 / 3
    drawn = random.normal(effect, deviation, (20_000, pairs))
    found = np.mean(stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < level)
    assert power.power(effect, deviation, pairs, level) == pytest.approx(found, abs=0.01)
    assert power.power(1e-9, deviation, pairs, level) == pytest.approx(level, abs=1e-6)
    assert power.power(power.resolved(deviation, pairs, level), deviation, pairs, level) == pytest.approx(0.8, abs=1e-6)
    needed = power.pairs_for(effect, deviation, level)
    assert power.power(effect, deviation, needed, level) >= 0.8 > power.power(effect, deviation, needed - 1, level)
    assert power.pairs_for(1.0, 0.001, 0.05) == 6  # a huge effect: 2 / 2^5 is above 0.05


def test_the_spread_is_that_of_the_pairs_of_a_task(tmp_path):
    path = tmp_path / "runs.csv"
    values = {"tiny/a": [0.70, 0.72, 0.69], "tiny/b": [0.71, 0.75], "tiny/c": [0.68, 0.70, 0.74], "other/a": [0.1, 0.9]}
    lines = [f"{name},{seed},{value}" for name, row in values.items() for seed, value in enumerate(row)]
    path.write_text("\n".join(["setting,seed,accuracy", *lines]))
    found = power.spread(path, "tiny")
    # a - b: -.01, -.03; a - c: .02, .02, -.05; b - c: .03, .05
    squares = 0.0002 + (0.0004 + 0.0004 + 0.0025 - 3 * (0.01 / 3) ** 2) + 0.0002
    assert found.measured == pytest.approx(np.sqrt(squares / 4))
    mean = np.mean([v for name, row in values.items() if name.startswith("tiny") for v in row])
    fewer = 2 * mean * (1 - mean) / 128 * (1 / 8 - 1 / 16)
    assert found.predicted == pytest.approx(np.sqrt(squares / 4 - fewer))


def test_the_page_shows_the_plan_of_now():
    text = Path("docs/measurements/results.md").read_text()
    for name, block in results.plan_blocks().items():
        assert f"<!-- {name} -->\n{block}\n<!-- /{name} -->" in text, "python -m benchmarks.validate_method plan"
    for setting in settings():
        assert f"| {setting.name} | {setting.seeds} |" in text


def rows_of(values: dict[str, list[float]]) -> results.Rows:
    """Settings with these accuracies; a response has 100 times as many tokens."""
    return {
        name: {seed: {"accuracy": a, "length": 100 * a} for seed, a in enumerate(row)} for name, row in values.items()
    }


def test_holm_runs_over_the_comparisons_of_one_hypothesis():
    tiny, noise = "tiny/cl_egrsd", np.array([0.0, 0.002, -0.002, 0.001, -0.001, 0.003, -0.003, 0.0])
    values = {tiny: 0.7 + noise, f"{tiny}, live teacher": 0.6 - noise, f"{tiny}, EMA teacher": 0.7 + noise[::-1],
              f"{tiny}, snapshot teacher": 0.8 + 0 * noise, f"{tiny}, no length bonus": 0.65 + 0 * noise}  # fmt: skip
    found = {f.comparison.control.rpartition(", ")[2]: f for f in results.compared(rows_of(values))}
    assert len(found) == 4
    assert [found[name].p for name in ("live teacher", "snapshot teacher")] == pytest.approx([3 * 2 / 2**8] * 2)
    assert found["no length bonus"].p == pytest.approx(2 / 2**8)  # the one of its family
    said = {name: results.verdict(f) for name, f in found.items()}
    assert said["live teacher"] == "holds, accuracy not equivalent within ±0.02"
    assert said["snapshot teacher"].startswith("the opposite holds")
    assert said["EMA teacher"] == "no difference shown, accuracy equivalent within ±0.02"
    assert said["no length bonus"].startswith("the opposite holds")  # it is about length, and this one is longer
    differs, equivalent, neither, length = results.short(list(found.values())).splitlines()
    assert "against live (3) +0.100; " in differs and "snapshot (3) -0.100" in differs and "EMA" not in differs
    assert equivalent.endswith(": frozen teacher against EMA (3).") and neither.endswith(": none.")
    assert "length bonus against none (6) +5.0 tokens" in length
    # With the spread of these pairs, and at the first step of Holm's correction.
    deviation = np.std(2 * noise, ddof=1)
    assert found["live teacher"].resolved == pytest.approx(power.resolved(deviation, 8, 0.05 / 3))


def test_an_equality_is_shown_or_differs():
    tiny, noise = "tiny/cl_egrsd", np.array([0.0, 0.002, -0.002, 0.001, -0.001, 0.003, -0.003, 0.0])
    values = {tiny: 0.7 + noise, f"{tiny}, quantile": 0.6 - noise, f"{tiny}, mix 0.5": 0.69 - noise}
    said = {f.comparison.control: results.verdict(f) for f in results.compared(rows_of(values))}
    assert said[f"{tiny}, quantile"] == "differs, accuracy not equivalent within ±0.02"
    assert said[f"{tiny}, mix 0.5"] == "differs, accuracy equivalent within ±0.02"


def test_pairs_are_the_seeds_that_both_have():
    comparison = Comparison("", "", "a", "b", "equal")
    rows = rows_of({"a": [0.5, 0.6, 0.7], "b": [0.4, 0.4]})
    del rows["a"][0]
    assert results.pairs(rows, comparison, "accuracy") == pytest.approx([0.2])


def test_tables_go_between_their_marks_and_nowhere_else(tmp_path):
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    results.write_document({"a": "| new \\1 |"}, document)
    assert document.read_text() == "before\n<!-- a -->\n| new \\1 |\n<!-- /a -->\nafter\n"
    with pytest.raises(RunError, match="0 places for b"):
        results.write_document({"b": ""}, document)


def finish(one: run.Run, accuracy: float = 0.7) -> None:
    """Write what a finished run leaves behind."""
    one.path.mkdir(parents=True)
    steps = [{"step": n, "accuracy": 0.5, "batch/tokens": 4000.0, "time/step": 2.0} for n in range(1, STEPS + 1)]
    final = {"step": STEPS, "evaluation/accuracy": accuracy, "evaluation/length/mean": 100 * accuracy}
    (one.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*steps, final]))


class Trainer:
    """Stands for servers and training processes: notes what is trained, and fails for settings in `broken`."""

    def __init__(self, monkeypatch, *broken: str):
        self.trained: list[str] = []
        self.servers = 0
        self.broken = broken
        monkeypatch.setattr(run, "_server", self.server)
        monkeypatch.setattr(run, "_train", self.train)
        for name, value in (("commit", "1234567"), ("machine", "2 cores of a test")):
            monkeypatch.setattr(record, name, lambda value=value: value)

    @contextlib.contextmanager
    def server(self, study, lane):
        self.servers += 1
        yield SimpleNamespace(urls=[f"http://{lane}:{self.servers}"])

    def train(self, one, urls, stop):
        self.trained.append(one.name)
        shutil.rmtree(one.path, ignore_errors=True)
        record.begin_record(one.path, one.words)
        if one.setting.name in self.broken:
            return "broken"
        finish(one)
        return ""


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_failed_run_is_named_and_stops_no_other(lanes, tmp_path, monkeypatch, capsys):
    trainer = Trainer(monkeypatch, "tiny/egrsd")
    arguments = ["run", "--output", str(tmp_path), "--lanes", str(lanes), "--only", "tiny/e"]
    assert command.main(arguments) == 1
    runs = run.runs_of(tmp_path, "tiny/e")
    assert len(runs) == 14 + 8 and {r.setting.name for r in runs} == {"tiny/egrsd", "tiny/egrsd, gamma 1"}
    # Each twice, with a new server after each failure; all others once.
    assert Counter(trainer.trained) == {r.name: 1 + (r.setting.name == "tiny/egrsd") for r in runs}
    assert trainer.servers >= 2 * 14
    failed = re.findall("failed: tiny/egrsd, seed (\\d+): broken", capsys.readouterr().err)
    assert sorted(map(int, failed)) == list(range(14))

    again = Trainer(monkeypatch)
    assert command.main(arguments) == 0
    assert sorted(again.trained) == sorted(r.name for r in runs if r.setting.name == "tiny/egrsd")
    assert again.servers == lanes
    rest = Trainer(monkeypatch)
    assert command.main(arguments) == 0 and not rest.trained


def test_runs_go_seed_by_seed(tmp_path):
    assert [r.seed for r in run.runs_of(tmp_path)] == sorted(r.seed for r in run.runs_of(tmp_path))


def test_runs_of_another_plan_are_refused_and_kept(tmp_path, monkeypatch, capsys):
    trainer = Trainer(monkeypatch)
    only = ["run", "--output", str(tmp_path), "--only", "tiny/egrsd, gamma"]
    first = run.runs_of(tmp_path, "tiny/egrsd, gamma")[0]
    finish(first)  # by the study of 0.1.0, which left no record
    assert command.main(only) == 2 and "made with another words" in capsys.readouterr().err
    assert first.path.exists() and not trainer.trained
    record.begin_record(first.path, first.words)
    record.check_same(first.path, first.words)
    with pytest.raises(BadArgument, match="words"):
        record.check_same(first.path, [*first.words, "--steps", "3"])


def test_a_server_that_does_not_start_ends_the_study(tmp_path, monkeypatch, capsys):
    trainer = Trainer(monkeypatch)

    def server(study, lane):
        raise RunError("no server")

    monkeypatch.setattr(run, "_server", server)
    assert command.main(["run", "--output", str(tmp_path)]) == 1
    assert "no server" in capsys.readouterr().err and not trainer.trained


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["--lanes", "0"], "--lanes is 0"), (["--only", "no"], "no setting starts with 'no'")],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused(words, reason, tmp_path, capsys):
    assert command.main(["run", "--output", str(tmp_path), *words]) == 2
    assert reason in capsys.readouterr().err


@pytest.fixture
def document(tmp_path) -> Path:
    """A copy of the page, with room for its picture."""
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "docs" / "measurements").mkdir()
    return Path(shutil.copy("docs/measurements/results.md", tmp_path / "docs" / "measurements"))


def test_the_page_fills_itself(tmp_path, document, monkeypatch):
    Trainer(monkeypatch)
    output, random = tmp_path / "runs", np.random.default_rng(0)
    for number, one in enumerate(run.runs_of(output, own=OWN)):
        if one.setting.name == "tiny/grpo" and one.seed == 3:
            continue
        record.begin_record(one.path, one.words)
        finish(one, 0.7 - 0.1 * ("grpo" in one.setting.name) + random.normal(0, 0.01))
        found = record.read_record(one.path) | {"began": 100.0 * number, "ended": 100.0 * number + 60, "load": 2.0}
        one.path.with_name(f"{one.path.name}.json").write_text(json.dumps(found))
    measured = {"share": 0.1, "h": 0.2, "egrsd": 0.3, "cl_egrsd": 0.4}
    vector = {"signal": 2.0, "signal_error": 1.0, "noise": 1.0}
    training = {"tiny/egrsd": [{"step": 1, "scale": 2.0, "uncertain": 0.1} | measured]}
    initial = {"tiny": {"types": {"filler": measured}, "resolution": {}, "gradients": {"grpo": vector}}}
    found = {"reading": {"tiny": {"teacher avg@8": 0.9}}, "training": training, "initial": initial}
    (output / "mechanism.json").write_text(json.dumps(found))
    words = ["results", "--output", str(output), "--document", str(document), "--objective", OWN]
    assert command.main(words) == 0
    text = document.read_text()
    assert "No result yet" not in text and "have not been made" not in text and "Not measured" not in text
    planned = sum(s.seeds for s in settings(OWN))
    assert f"{planned - 1} of {planned} planned runs" in text and "Missing: tiny/grpo (1)." in text
    assert "commit 1234567, on 2 cores of a test" in text and f"{(planned - 1)} minutes of wall clock" in text
    assert "| 1, tiny | EGRSD against GRPO | higher | 13 |" in text
    assert "| yours | HighEntropy against CL-EGRSD | equal | 8 |" in text
    assert re.search(r"\*\*Accuracy differs\*\*: .*EGRSD against GRPO \(1, tiny\) \+0\.1", text)
    assert "| tiny/cl_egrsd | 14 | 0.70" in text and "| 80000 ± 0 |" in text
    assert (tmp_path / "docs/images/results.png").read_bytes().startswith(b"\x89PNG")
    assert len((document.parent / "results_runs.csv").read_text().splitlines()) == planned
    assert command.main(words) == 0 and document.read_text() == text


def test_a_study_without_runs_leaves_the_page_alone(tmp_path, document, capsys):
    before = document.read_text()
    assert command.main(["results", "--output", str(tmp_path / "none"), "--document", str(document)]) == 2
    assert "no finished run" in capsys.readouterr().err and document.read_text() == before


def test_wall_clock_counts_overlapping_runs_once():
    assert results._covered([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13


def test_the_commit_says_if_files_differ_from_it(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert measure.commit() == ""
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "a").write_text("1")
    for words in (["init", "-q"], ["add", "a"], [*who, "commit", "-qm", "c"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert re.fullmatch("[0-9a-f]{7,}", measure.commit())
    (tmp_path / "a").write_text("2")
    assert measure.commit().endswith("+")
    assert record.machine().startswith(f"{len(os.sched_getaffinity(0))} cores")


def test_the_signal_at_the_initial_weights_is_that_of_the_running_advantage():
    """Of right responses with the bonus, wrong ones 0, whitened by mean and sample deviation."""
    lengths, rewards = [60, 240, 120, 30], [1.0, 1.0, 0.0, 1.0]
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    batch = mechanism.Sampled([None] * 4, [[0] * n for n in lengths], rewards, bounds)
    shaped = np.array([1.375, 1.0, 0.0, 1.4375])
    expected = (shaped - shaped.mean()) / (shaped.std(ddof=1) + 1e-6)
    found = mechanism.signal_of(batch, mechanism.family()["egrsd"])
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_measurements_of_the_initial_weights_are_kept(tmp_path, monkeypatch):
    calls = []

    def measure(*arguments):
        calls.append(arguments)
        return {"x": len(calls)}

    path = tmp_path / "a" / "b.json"
    assert mechanism._kept(path, measure, 1, 2) == mechanism._kept(path, measure, 1, 2) == {"x": 1}
    monkeypatch.setitem(FAMILY, "egrsd", FAMILY["gate_off"])
    assert mechanism._kept(path, measure, 1, 2) == {"x": 2} and calls == [(1, 2)] * 2


@pytest.mark.heavy
def test_the_mechanism_of_a_few_problems(monkeypatch):
    every = mechanism.tiny.make_problems
    monkeypatch.setattr(mechanism.tiny, "make_problems", lambda random: ([], every(random)[1][:4]))
    found = mechanism.measure(Path("examples/tiny/model"), wrong=False)
    assert sum(row["share"] for row in found["types"].values()) == pytest.approx(1.0)
    for row in found["types"].values():
        assert row["egrsd"] == pytest.approx(1 - 0.3 * row["h"], abs=1e-5) and row["egrsd"] <= row["cl_egrsd"] <= 1
    assert list(found["gradients"]) == ["grpo", "gate_off", "egrsd", "cl_egrsd", "uncertain", "certain"]
    assert all(row["noise"] > 0 for row in found["gradients"].values())


@pytest.mark.heavy
def test_an_interrupted_mechanism_goes_on_with_what_it_has(tmp_path, capsys):
    for part, names in {"reading": mechanism._MODELS, "initial": mechanism._CASES}.items():
        for name in names:
            mechanism._kept(tmp_path / "mechanism" / part / f"{name}.json", lambda found: found, {"of": [part, name]})
    mechanism.main(tmp_path, lanes=1)
    found = json.loads((tmp_path / "mechanism.json").read_text())
    assert found.pop("training") == {} and capsys.readouterr().out.count("no entropies over training") == 2
    assert {part: list(rows) for part, rows in found.items()} == {
        "reading": ["tiny", "doubting"], "initial": ["tiny", "doubting", "doubting/wrong"],
    }  # fmt: skip
    assert all(row == {"of": [part, name]} for part, rows in found.items() for name, row in rows.items())
