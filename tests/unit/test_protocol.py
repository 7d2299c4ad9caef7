"""The EGRSD paper's evaluation: its keys, how often it samples a set, its table."""

import contextlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_egrsd.cli import main
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.benchmarks import BENCHMARKS, ProblemSet
from megatron_egrsd.data.samples import Problem
from megatron_egrsd.evaluation import evaluate as module
from megatron_egrsd.evaluation.protocol import (
    PUBLISHED,
    SETS,
    overridden,
    protocol_keys,
    published_models,
    summary_columns,
)
from megatron_egrsd.evaluation.summary import Estimate
from megatron_egrsd.evaluation.table import TABLE_WIDTH, deviations, paper_summary, paper_table

# The Avg column of the published tables, in their order.
AVERAGES = {
    "Qwen3-4B": [65.59, 54.88, 65.90, 66.61, 65.35, 67.24, 67.14],
    "Qwen3-8B": [67.28, 66.99, 67.41, 67.51, 67.04, 68.23, 69.32],
    "AceReason-Nemotron-7B": [60.63, 59.60, 60.52, 60.13, 60.75, 61.45],
}
ROWS = [
    (model, method, average)
    for model, averages in AVERAGES.items()
    for method, average in zip(PUBLISHED[model], averages, strict=True)
]


def config(*words: str):
    return parse_config(["--data.train", "-", "--model.path", "m", *words])


def protocol(*words: str):
    return config("--evaluation.protocol", "egrsd_paper", *words)


def results(*names: str) -> dict[str, dict[str, Estimate]]:
    """An untrained Qwen3-4B, were its responses to all sets 11,008 tokens long."""
    accuracies = dict(zip(SETS, PUBLISHED["Qwen3-4B"]["untrained"][0], strict=True))
    return {n: {"accuracy": Estimate(accuracies[n] / 100), "length/mean": Estimate(11_008.0)} for n in names or SETS}


def text(table) -> list[str]:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


@pytest.mark.parametrize(("model", "method", "average"), ROWS)
def test_averages_are_the_published_ones(model, method, average):
    accuracies, _ = PUBLISHED[model][method]
    assert len(accuracies) == len(SETS)
    assert summary_columns(accuracies, None)[0] == pytest.approx(average, abs=0.01)


def test_efficiency_is_accuracy_per_thousand_tokens():
    assert summary_columns([60.0, 70.0], [8_000, 12_000]) == (65.0, 10_000, 6.5)
    accuracies, tokens = PUBLISHED["Qwen3-4B"]["EGRSD"]
    assert summary_columns(accuracies, [tokens])[2] == pytest.approx(67.24 / 11.064, abs=0.001)
    assert summary_columns([50.0], None) == (50.0, None, None)


def test_protocol_sets_its_keys_and_any_key_beside_it_overrides_it():
    c = protocol()
    e = c.evaluation
    assert (e.rollouts_per_problem, e.temperature, e.top_p, e.top_k) == (4, 1.0, 0.95, 0)
    assert c.rollout.max_response_tokens == 32_768 and c.data.enable_thinking
    assert e.benchmarks.sets == list(SETS) and set(SETS) <= set(BENCHMARKS)
    assert overridden(c) == {}
    other = protocol("--evaluation.top_p", "0.9", "--evaluation.benchmarks.sets", '["gsm8k"]')
    assert other.evaluation.top_p == 0.9 and other.evaluation.benchmarks.sets == ["gsm8k"]
    assert overridden(other) == {"evaluation.top_p": (0.9, 0.95)}
    assert deviations(overridden(other)) == "not as in the paper: evaluation.top_p = 0.9 (not 0.95)"
    assert overridden(protocol("--evaluation.top_k", "20")) == {"evaluation.top_k": (20, 0)}
    assert protocol_keys("") == overridden(config()) == {}


def test_a_file_overrides_the_protocol_and_a_preset_stands_beside_it(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("objective: {preset: egrsd}\nevaluation: {protocol: egrsd_paper, rollouts_per_problem: 2}\n")
    c = config("--config", str(file))
    assert c.evaluation.rollouts_per_problem == 2 and c.evaluation.top_p == 0.95
    assert c.objective.preset == "egrsd" and c.objective.lookahead == 0


def test_mistakes(capsys):
    words = ["--data.train", "-", "--model.path", "m", "--evaluation.protocol"]
    assert main(["train", *words, "egrsd_paper", "--dry-run"]) == 2
    assert "evaluation.protocol is for megatron-egrsd evaluate" in capsys.readouterr().err
    assert main(["train", *words, "egrsd", "--dry-run"]) == 2
    assert "egrsd_paper" in capsys.readouterr().err


def test_reading_the_configuration_imports_nothing_heavy():
    code = (
        "import sys; from megatron_egrsd.config_reader import parse_config\n"
        "parse_config(sys.argv[1:]); print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    )
    words = ["--data.train", "-", "--model.path", "m", "--evaluation.protocol", "egrsd_paper"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_table_of_all_sets():
    lines = text(paper_table(results(), ["Qwen3-4B"], {}))
    (own,) = (line for line in lines if "this checkpoint" in line)
    assert own.split()[2:] == ["73.02", "65.00", "41.56", "86.93", "33.09", "93.96", "65.59", "11,008", "5.96"]
    assert next(line for line in lines if "untrained" in line).split()[2:] == own.split()[2:]
    assert len([line for line in lines if "Qwen3-4B" in line]) == 7 and not any("Qwen3-8B" in line for line in lines)


def test_every_digit_fits_into_the_width_of_a_log():
    console = Console(width=TABLE_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(paper_table(results(), list(PUBLISHED), {}))
    lines = captured.get().splitlines()
    (last,) = (line for line in lines if "61.45" in line)
    assert last.split()[:2] == ["AceReason-Nemotron-7B", "CL-EGRSD"] and last.split()[-2:] == ["7,943", "7.74"]
    assert not any("…" in line for line in lines)


def test_table_without_some_sets_has_no_summary():
    table = paper_table(results("aime24", "gsm8k"), published_models("hf"), {"evaluation.top_p": (0.9, 0.95)})
    lines = text(table)
    (own,) = (line for line in lines if "this checkpoint" in line)
    assert own.split()[2:] == ["73.02", "-", "-", "-", "-", "93.96", "-", "-", "-"]
    assert len([line for line in lines if "Qwen3-" in line]) == 14 and "top_p = 0.9 (not 0.95)" in lines[-1]
    untrained_8b = next(line for line in lines if "Qwen3-8B untrained" in line)
    assert untrained_8b.split()[-3:] == ["67.28", "-", "-"]  # its lengths were not published
    assert paper_summary(results("aime24")) == (None, None, None)


def test_published_rows_are_chosen_by_the_directorys_name():
    assert published_models("/models/Qwen3-4B") == published_models("runs/qwen3-4b-egrsd/") == ["Qwen3-4B"]
    assert published_models("/Qwen3-4B/Qwen3-8B") == ["Qwen3-8B"]
    assert published_models("runs/mine/hf") == list(PUBLISHED)


@pytest.fixture
def evaluation(monkeypatch):
    """Make an evaluation of two sets of two problems, the file of its samples a plain dictionary."""

    def make(c):
        sets = [ProblemSet(n, "-", [Problem(str(i), f"{n} {i}", "1") for i in range(2)]) for n in ("aime24", "gsm8k")]
        tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda _: 0, unk_token_id=0, decode=lambda _: "")
        prompt = SimpleNamespace(student_ids=[1])
        builder = SimpleNamespace(tokenizer=tokenizer, opened="", build=lambda *_, **__: prompt)
        return module.Evaluation(c, sets, builder, None, SimpleNamespace(rows={}))

    return make


def test_aime24_is_sampled_five_times_as_often(evaluation):
    run = evaluation(protocol())
    assert run.k == {"aime24": 20, "gsm8k": 4} and run.missing() == 2 * 20 + 2 * 4
    run.file.rows = {("aime24", "0", j): {} for j in range(20)} | {("gsm8k", "0", j): {} for j in range(6)}
    assert run.missing() == 20 + 4  # samples beyond the k of a set are not counted
    assert evaluation(config()).k == {"aime24": 8, "gsm8k": 8}


def test_client_is_asked_for_the_samples_of_each_set(evaluation, monkeypatch):
    asked = []

    class Client:
        def __init__(self, *_):
            pass

        def generate(self, prompts, n, *, settings, done, **_):
            assert settings is run.config.evaluation and settings.top_p == 0.95
            asked.extend((i, j) for i in range(len(prompts)) for j in range(n) if (i, j) not in done)

    run = evaluation(protocol("--evaluation.benchmarks.deterministic", "false"))
    monkeypatch.setattr(module, "stop_token_ids", lambda *_: [0])
    run.file.rows = {("gsm8k", "1", 2): {}, ("aime24", "0", 19): {}}
    monkeypatch.setattr(module, "RolloutClient", Client)
    monkeypatch.setattr(module, "RolloutServers", lambda *_: contextlib.nullcontext())
    run.sample(None)
    aime = {(i, j) for i in (0, 1) for j in range(20)} - {(0, 19)}
    gsm8k = {(i, j) for i in (2, 3) for j in range(4)} - {(3, 2)}
    assert set(asked) == aime | gsm8k and len(asked) == len(set(asked))


def test_results_hold_the_summary(tmp_path):
    c = protocol("--output", str(tmp_path), "--evaluation.top_p", "0.9")
    sets = [ProblemSet(n, "-", []) for n in SETS]
    run = SimpleNamespace(sets=sets, k=dict.fromkeys(SETS, 4))
    module._write_results(c, run, results(), {}, module.overridden(c))
    content = json.loads((tmp_path / "results.json").read_text())["protocol"]
    assert content.pop("avg") == pytest.approx(65.59, abs=0.01)
    assert content.pop("eff") == pytest.approx(65.59 / 11.008, abs=0.001)
    assert content == {"name": "egrsd_paper", "overridden": {"evaluation.top_p": 0.9}, "avg_len": 11_008.0}


def test_templates_of_the_student_decide_a_sample(monkeypatch):
    monkeypatch.setattr(module, "digest", lambda _: "d")
    before, after = (module._settings(config(*w)) for w in ([], ["--data.student_template", "Problem: {problem}"]))
    assert {key for key in before if before[key] != after[key]} == {"data.student_template"}
    teacher = module._settings(config("--data.teacher_template", "{problem} {answer}"))
    assert teacher == before
