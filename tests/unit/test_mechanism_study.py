"""The study of the gate on a pretrained model: token classes by hand, statistics on data with a planted structure."""

import dataclasses
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.mechanism import analysis, page, scoring
from benchmarks.mechanism.__main__ import main
from benchmarks.mechanism.columns import columns, places
from benchmarks.mechanism.contexts import CONTEXTS, TeacherContexts
from benchmarks.mechanism.dumps import read
from benchmarks.mechanism.results import results
from benchmarks.mechanism.tokens import KINDS, ROLES, token_kinds, token_roles
from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.samples import Problem, Rollout
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.report.scored_dump import load_scores, save_scores
from tests.models import make_qwen3
from tests.presets import preset_objective
from tests.unit.test_scores import batch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/tiny/model"


# -- classes of tokens ------------------------------------------------------------------------------------------


def test_kinds_are_those_of_the_characters():
    pieces = [" The", "re", " are", " ", "4", "8", " =", "\n\n", "x2", "", "é", "$", "\t", "<|im_end|>"]
    word, number, symbol, space, newline, end = KINDS
    expected = [word, word, word, space, number, number, symbol, newline, word, symbol, word, symbol, space]
    assert [KINDS[i] for i in token_kinds(pieces, ended=True)] == [*expected, end]
    assert [KINDS[i] for i in token_kinds(pieces, ended=False)] == [*expected, word]  # cut off: text like any other
    assert token_kinds([], ended=True) == []


@pytest.mark.parametrize(
    "piece_roles",
    [
        "Therefore:style ,:style  Natal:other ia:other  sold:other",
        "There:style fore:style  apples:other",  # a part of a word has the role of the word
        " Let:style 's:style  count:other",
        "$:task 5:task ,:task 0:task 0:task .:task 5:task .:style",  # the last point ends the sentence
        "4:task  *:task  2:task  -:task  1:task  =:task  7:task",
        "costs:other  :other 4:task  :style dollars:other  :style \n:style 5:task",  # a space before a number, and not
        "-:style  1:task  egg:other",  # a bullet
        "**:style Step:style  1:task :style **:style",
        "ten:task -:style year:other",
        "half:task  of:other  x:task  and:other  a:other  I:style",
        "\\:style frac:task {:style 1:task }:style {:style 2:task }:style",
        "\n:style \n\n:style",
    ],
)
def test_roles_by_hand(piece_roles):
    pairs = [pair.rpartition(":") for pair in _split(piece_roles)]
    pieces, expected = [p for p, _, _ in pairs], [r for _, _, r in pairs]
    assert [ROLES[i] for i in token_roles(pieces, ended=False)] == expected


def _split(text: str) -> list[str]:
    """Return the "piece:role" of a text; one space ends a role, a second one begins a piece."""
    parts, rest = [], text
    while rest:
        end = min(i for i in (rest.find(f":{role}") + len(role) + 1 for role in ROLES if f":{role}" in rest))
        parts.append(rest[:end])
        rest = rest[end:].removeprefix(" ")
    return parts


def test_the_end_of_the_turn_is_style():
    assert [ROLES[i] for i in token_roles(["9", "9"], ended=True)] == ["task", "style"]


# -- statistics -------------------------------------------------------------------------------------------------


def test_parts_and_means_against_plain_python():
    random = np.random.default_rng(0)
    classes, values = random.integers(0, 3, 50), random.random(50)
    rows = analysis.by_class(classes, ("a", "b", "c", "none"), {"v": values})
    parts = analysis.parts(values, classes, ("a", "b", "c", "none"))
    for i, name in enumerate("abc"):
        own = [v for v, k in zip(values, classes, strict=True) if k == i]
        assert rows[name] == pytest.approx({"share": len(own) / 50, "v": sum(own) / len(own)})
        assert parts[name] == pytest.approx(sum(own) / values.sum())
    assert rows["none"]["share"] == parts["none"] == 0 and np.isnan(rows["none"]["v"])


def test_style_against_task_finds_a_gap_that_was_planted():
    role = np.array([0, 0, 1, 2, 2, 2])
    found = analysis.style_against_task(np.array([3.0, -3.0, 0.0, 1.0, -1.0, 1.0]), role, ROLES)
    assert found["gap/style"] == pytest.approx(6 / 9) and found["gap/task"] == pytest.approx(3 / 9)
    assert found["tokens/style"] == pytest.approx(2 / 6) and found["ratio"] == pytest.approx(3)
    assert analysis.style_against_task(np.array([0, 0, 1.0, 1, 1, 1]), role, ROLES)["gap/style"] == 0


def test_auroc_counts_pairs():
    random = np.random.default_rng(1)
    score, positive = random.integers(0, 5, 40), random.random(40) < 0.3
    pairs = [np.sign(a - b) / 2 + 0.5 for a, b in product(score[positive], score[~positive])]
    assert analysis.auroc(score, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(analysis.auroc(score, np.ones(40, bool)))


def test_correlations_are_spearmans_and_partial_ones_those_of_residuals():
    random = np.random.default_rng(2)
    position, noise = random.random((2, 300))
    entropy = position + noise
    target = np.exp(entropy + 0.5 * random.random(300))
    found = analysis.correlations(target, position, entropy)
    assert found["entropy"] == pytest.approx(stats.spearmanr(target, entropy).statistic)
    y, p, e = (stats.rankdata(x) for x in (target, position, entropy))
    rest = [a - np.polyval(np.polyfit(p, a, 1), p) for a in (y, e)]  # what position leaves of either
    assert found["entropy given position"] == pytest.approx(np.corrcoef(*rest)[0, 1])
    assert np.isnan(analysis.correlations(np.ones(300), position, entropy)["position"])


def planted(driver: str, responses: int = 60, length: int = 40):
    """Return (target, position, entropy, problem) whose target follows one of the two alone; the two are correlated."""
    random = np.random.default_rng(3)
    position = np.tile(np.arange(length) / (length - 1), responses)
    entropy = 0.7 * position + random.random(position.size)
    own = {"position": position, "entropy": entropy, "none": np.zeros(position.size)}[driver]
    # Not monotone, as position may be: large in the middle.
    target = -((own - own.mean()) ** 2) + 0.02 * random.standard_normal(position.size)
    return target, position, entropy, np.repeat(np.arange(responses), length)


@pytest.mark.parametrize(("driver", "idle"), [("position", "entropy"), ("entropy", "position")])
def test_the_planted_predictor_is_found_and_the_other_adds_nothing(driver, idle):
    target, position, entropy, problem = planted(driver)
    found = analysis.bootstrap(problem, analysis.predicted(target, position, entropy, problem), 200)
    assert found[driver]["low"] > 0.85
    assert found[idle]["high"] < found[driver]["low"] - 0.3
    assert abs(found["both"]["value"] - found[driver]["value"]) < 0.01
    sign = 1 if driver == "entropy" else -1
    assert sign * found["entropy - position"]["value"] > 0.3


def test_a_monotone_driver_leaves_no_partial_correlation_to_the_other():
    random = np.random.default_rng(4)
    position = random.random(4000)
    entropy = position + 0.5 * random.random(4000)
    target = position + 0.1 * random.random(4000)
    found = analysis.correlations(target, position, entropy)
    assert found["entropy"] > 0.8 and abs(found["entropy given position"]) < 0.1 < found["position given entropy"]


def test_noise_is_not_predicted_out_of_fold():
    target, position, entropy, problem = planted("none", responses=10)
    found = analysis.predicted(target, position, entropy, problem)(np.arange(len(target)))
    assert max(found["position"], found["entropy"], found["both"]) <= 0
    # Fitted and judged on the same tokens it would be.
    together = analysis.predicted(target, position, entropy, np.zeros(len(target)))(np.arange(len(target)))
    assert together["both"] > 0


def test_the_bootstrap_draws_problems_not_tokens():
    """Tokens of a problem are equal: the interval is that of 40 values, not of 4,000."""
    effects = np.random.default_rng(5).standard_normal(40)
    problem = np.repeat(np.arange(40), 100)
    found = analysis.bootstrap(problem, lambda at: {"mean": effects[problem][at].mean()}, 2000)["mean"]
    error = 1.96 * effects.std() / np.sqrt(40)
    assert found["value"] == pytest.approx(effects.mean())
    assert (found["high"] - found["low"]) / 2 == pytest.approx(error, rel=0.1)
    single = analysis.bootstrap(np.zeros(3), lambda at: {"n": float(len(at))}, 10)["n"]
    assert single["value"] == 3 and np.isnan(single["low"])


def test_agreement_sees_only_gaps_with_a_sign_and_splits_by_reward():
    signed = np.array([1.0, 1.0, -1.0, 1e-4, -1.0, 1.0])
    position, right = np.array([0.9, 0.8, 0.1, 0.5, 0.3, 0.2]), np.array([1, 1, 1, 1, 0, 0], bool)
    found = analysis.agreement(signed, position, 1 - position, right, 0.01)
    assert found["right/agree"] == pytest.approx(2 / 3) and found["wrong/agree"] == 0.5
    assert found["right/position"] == 1 and found["right/entropy"] == 0 and found["wrong/position"] == 0
    assert found["all/agree"] == pytest.approx(3 / 5)


# -- dumps ------------------------------------------------------------------------------------------------------

CL_EGRSD = preset_objective("cl_egrsd", attenuation=0.8, lookahead=2)


def test_columns_are_those_of_the_dump():
    scored = batch(CL_EGRSD)
    found = columns([scored, [dataclasses.replace(r, step=5) for r in batch(CL_EGRSD)]])
    assert len(found.delta) == 58 and len(found.keys) == 12 == len(set(found.keys))
    first = slice(0, 5)
    np.testing.assert_allclose(found.delta[first], scored[0].teacher_log_prob - scored[0].student_log_prob, atol=1e-6)
    np.testing.assert_allclose(found.position[first], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(found.looking_gate[first], scored[0].gate, atol=1e-6)
    np.testing.assert_allclose(found.gate[first], 1 - 0.8 * scored[0].normalized_entropy, atol=1e-6)
    assert np.unique(found.direction).tolist() == [-1, 0, 1] and found.right.tolist() == [False, True] * 6
    assert KINDS[found.kind[4]] == "end of turn" and ROLES[found.role[4]] == "style"
    assert found.problem[:29].tolist() == [0] * 15 + [1] * 14 == found.problem[29:].tolist()
    keys = [found.keys[2], found.keys[0]]
    assert places(found.keys, keys).tolist() == [*range(6, 15), *range(5)]


def test_contexts_are_compared_on_the_responses_that_both_have():
    scored = batch(CL_EGRSD)
    other = [dataclasses.replace(r, teacher_log_prob=r.teacher_log_prob + 1) for r in scored[1:]]
    found = results({"template": [scored], "other_solution": [other]}, 20)
    own, contrast = found["style"]["other_solution"], found["style"]["template - other_solution"]
    assert own["responses"] == contrast["responses"] == 5 and own["correlation"] == pytest.approx(1)
    # The contrast is 1 nat everywhere: its parts are those of the tokens.
    for role in ROLES:
        assert contrast[f"gap/{role}"]["value"] == pytest.approx(contrast[f"tokens/{role}"]["value"], abs=1e-6)
    assert found["style"]["template"]["more/style"]["value"] == 0
    assert "content" not in found["position"]  # a response lacks one of the two contexts
    whole = results({"template": [scored], "other_solution": [scored]}, 5)
    assert "content" in whole["position"] and page.blocks(whole)["position"].count("\n") == 14


def test_dumps_without_a_teacher_are_refused():
    with pytest.raises(BadArgument, match="no teacher"):
        results({"run": [batch(preset_objective("grpo"), teacher=False)]}, 5)


@pytest.mark.heavy
def test_the_dumps_of_a_run_are_read(tmp_path, capsys):
    save_scores(batch(CL_EGRSD), tmp_path / "run/scores/step_000004.jsonl")
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--resamples", "20"]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["extent"]["run"]["tokens"] == 29 and found["figure_4"]["run"]["window"] == 2
    assert (tmp_path / "out/picture.png").read_bytes().startswith(b"\x89PNG")
    assert "| wrong_sibling |" not in (printed := capsys.readouterr().out) and "| R² out of fold, both |" in printed
    blocks = page.blocks(found)
    empty = "".join(f"<!-- {name} -->\nOLD\n<!-- /{name} -->\n" for name in [*blocks, "picture"])
    (tmp_path / "page.md").write_text(empty)
    words = ["--resamples", "20", "--document", str(tmp_path / "page.md")]
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "out"), *words]) == 0
    assert all(text in (tmp_path / "page.md").read_text() for text in blocks.values())
    assert (tmp_path / "page.png").exists() and "OLD" not in (tmp_path / "page.md").read_text()
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--seed", "1"]) == 2
    assert "--seed changes nothing" in capsys.readouterr().err


# -- model ------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_whole_passes_in_fp64(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_qwen3(tmp_path / "model"), dtype=torch.float32).eval()
    prompts = [[5, 6, 7], [8], [5, 6, 7]]
    responses = [[9, 10, 11, 2], [12, 2], [13]]
    found = scoring.score_all(model, prompts, responses, 0.7)
    model = model.double()
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.7
        p = logits.log_softmax(-1)
        expected = torch.stack([p.gather(1, torch.tensor(response)[:, None])[:, 0], -(p.exp() * p).sum(-1)])
        np.testing.assert_allclose(found[i], expected.numpy(), atol=2e-5)


@pytest.fixture(scope="module")
def tiny():
    words = ["--model.path", str(TINY), "--data.train", "x.jsonl", "--rollout.max_response_tokens", "100"]
    words += ["--data.teacher_template", "{problem}\nref:{solution}"]
    return parse_config(words), AutoTokenizer.from_pretrained(TINY)


def test_contexts_show_what_their_names_say(tiny):
    config, tokenizer = tiny
    problems = [Problem("a", "1+1=?", "2", "1+1=2"), Problem("b", "3+4=?", "7", "3+4=7")]
    contexts = TeacherContexts(tokenizer, config, 512, CONTEXTS)
    prompts = [contexts.template.build(p) for p in (problems[0], problems[0], problems[0], problems[1])]
    texts, rewards = ["1+1=2", "1+1=3", "1+1=4", "3+4=7"], [1.0, 0.0, 0.0, 1.0]
    rollouts = [
        Rollout(prompt, int(i == 3), tokenizer.encode(text), [-1.0], "stop", 0, text, reward)
        for i, (prompt, text, reward) in enumerate(zip(prompts, texts, rewards, strict=True))
    ]
    others = {"a": problems[1], "b": problems[0]}

    def read_by(name: str) -> list[str | None]:
        found = contexts.prompts(name, rollouts, others)
        return [ids and tokenizer.decode(ids).split("user\n")[1].split("<|im_end|>")[0] for ids in found]

    assert read_by("template") == ["1+1=?\nref:1+1=2"] * 3 + ["3+4=?\nref:3+4=7"]
    assert read_by("other_solution") == ["1+1=?\nref:3+4=7"] * 3 + ["3+4=?\nref:1+1=2"]
    assert read_by("sibling") == [None, "1+1=?\nref:1+1=2", "1+1=?\nref:1+1=2", None]
    assert read_by("wrong_sibling") == ["1+1=?\nref:1+1=3", "1+1=?\nref:1+1=4", "1+1=?\nref:1+1=3", None]


def test_gsm8k_is_read_without_its_calculations(tmp_path):
    (problem, *rest) = read([str(ROOT / "tests/data/gsm8k_test.jsonl")])
    assert len(rest) == 39 and problem.answer == "114,200" and "####" not in problem.solution
    assert problem.solution.startswith("He makes 2000*52=$104,000 a year\n")
    with pytest.raises(BadArgument, match="two problems have the id"):
        read([str(ROOT / "tests/data/gsm8k_test.jsonl")] * 2)
    (tmp_path / "p.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    with pytest.raises(BadArgument, match="lacks a text, an answer or a solution"):
        read([str(tmp_path / "p.jsonl")])


@pytest.mark.heavy
def test_an_interrupted_study_goes_on_and_gives_the_same(tmp_path, capsys):
    words = [str(TINY), "--problems", str(ROOT / "examples/tiny/heldout.jsonl"), "--resamples", "20"]
    words += ["--data.teacher_template", "{problem}\nref:{solution}", "--rollout.max_response_tokens", "120"]
    words += ["--rollout.prompts_per_step", "3", "--rollout.rollouts_per_prompt", "2"]
    words += ["--contexts", "template,other_solution,wrong_sibling"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*words, "--batches", "2", "--output", str(whole)]) == 0
    assert main([*words, "--batches", "1", "--output", str(broken)]) == 0
    (broken / "other_solution/scores/step_000001.jsonl").unlink()
    assert main([*words, "--batches", "2", "--output", str(broken)]) == 0
    names = sorted(p.relative_to(whole) for p in whole.rglob("*.json*"))
    assert len(names) == 2 + 2 * 4 and names == sorted(p.relative_to(broken) for p in broken.rglob("*.json*"))
    for name in names:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    scored = load_scores(whole / "template/scores/step_000001.jsonl")
    assert [len(scored), scored[0].objective.lookahead, scored[0].objective.attenuation] == [6, 5, 0.3]
    assert isinstance(scored[0].objective, ObjectiveConfig)
    for r in scored:  # the warm-up's advantage: the shaped reward less 0.5
        assert r.advantage == pytest.approx(r.shaped_reward - 0.5) and (r.reward > 0.5) == (r.advantage > 0)
    # The teacher reads its solution: the tiny model was made so (examples/tiny/README.md).
    found = json.loads((whole / "results.json").read_text())
    assert found["style"]["other_solution"]["correlation"] < 0.6
    assert main([*words, "--batches", "2", "--output", str(whole), "--seed", "1"]) == 2
    assert "other settings" in capsys.readouterr().err
    assert main([*words, "--batches", "99", "--output", str(whole)]) == 2
    assert "problems fit" in capsys.readouterr().err
