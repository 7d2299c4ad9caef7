"""Scored dumps: what is written reads back exactly, a broken line is named, the pieces join to the response."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.data.samples import Problem, Prompt, Rollout
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.objectives.signal import History
from megatron_egrsd.report.scored_dump import load_scores, save_scores, scored_rollouts, token_pieces
from tests.presets import preset_objective


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges, so that one character takes several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["the sum of the angles is the answer \\frac{1}{2}"], trainer)
    bpe.add_special_tokens(["<|im_end|>"])
    bpe.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")


TOKENIZER = byte_level()
HISTORY = History().after([1.3, 0.0]).after([0.0, 1.1])


def batch(
    objective: ObjectiveConfig,
    teacher: bool = True,
    text: str = "",
    problem: Problem | None = None,
    divergence: bool = False,
):
    """Make six rollouts of 5 (or `text`), 1, 9, 4, 7 and 3 tokens in two groups, the second without advantage."""
    g = np.random.default_rng(0)
    rollouts, student, scores = [], {}, {}
    for i, length in enumerate([5, 1, 9, 4, 7, 3]):
        ids = [*g.integers(0, 256, length - 1).tolist(), TOKENIZER.eos_token_id]
        if text and i == 0:
            ids = TOKENIZER.encode(text)
        length, asked = len(ids), problem or Problem(str(i // 3), "1 + 1?", "2", "1 + 1 = 2")
        prompt = Prompt(asked, TOKENIZER.encode("1 + 1?"), TOKENIZER.encode("1 + 1? It is 2."))
        rollouts.append(Rollout(prompt, i // 3, ids, (-g.random(length)).tolist(), "stop", 3, "", float(i % 2)))
        student[i], scores[i] = (
            np.stack([-4 * g.random(length), 3 * g.random(length)]).astype(np.float32) for _ in range(2)
        )
        if divergence:
            student[i] = np.concatenate([student[i], g.random((1, length), np.float32) + 0.01])
    advantage, rewards = [0.5, -1.0, 0.5, 0.0, 0.0, 0.0], [1.2 * (i % 2) for i in range(6)]
    taught, about = scores if teacher else None, {"step": 4, "vocab_size": 261, "history": HISTORY}
    return scored_rollouts(rollouts, rewards, advantage, student, taught, objective, TOKENIZER, **about)


def assert_equal(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert y.dtype == np.float32 and np.array_equal(x, y, equal_nan=True), field.name
        else:
            assert x == y, field.name


@pytest.mark.parametrize("normalization", ["batch_max", "quantile", "sequence_max", "log_vocab"])
def test_round_trip_is_exact(tmp_path, normalization):
    objective = ObjectiveConfig(entropy_normalization=normalization, importance_cap=2.0)
    scored = batch(objective)
    scored[0].student_log_prob[1] = -np.inf  # an impossible token: JSON has no infinity
    save_scores(scored, tmp_path / "scores" / "step_000004.jsonl")
    loaded = load_scores(tmp_path / "scores" / "step_000004.jsonl")
    scored[0].student_log_prob[1] = np.nan
    for a, b in zip(loaded, scored, strict=True):
        assert_equal(b, a)
    assert [p.name for p in (tmp_path / "scores").iterdir()] == ["step_000004.jsonl"]


@pytest.mark.parametrize("normalization", ["batch_max", "quantile", "sequence_max", "log_vocab"])
def test_the_columns_are_the_method(normalization):
    """Every column of the dump follows from the ones before it, token by token."""
    objective = ObjectiveConfig(entropy_normalization=normalization, attenuation=0.95, lookahead=1)
    for r in batch(objective):
        h = np.clip(r.teacher_entropy / r.entropy_scale, 0, 1)
        ahead = np.minimum(h, np.append(h[1:], np.inf))
        ratio = np.exp(np.sign(r.advantage) * (r.teacher_log_prob - r.student_log_prob))
        magnitude = np.clip(ratio, 0.8, 1.2)
        np.testing.assert_allclose(r.normalized_entropy, h, atol=1e-6)
        np.testing.assert_allclose(r.lookahead_entropy, ahead, atol=1e-6)
        np.testing.assert_allclose(r.gate, np.maximum(1 - 0.95 * ahead, 0.1), atol=1e-6)
        np.testing.assert_allclose(r.weight, r.advantage * magnitude * r.gate, rtol=1e-5, atol=1e-7)


def test_without_a_teacher(tmp_path):
    scored = batch(preset_objective("grpo"), teacher=False)
    save_scores(scored, tmp_path / "s.jsonl")
    for r in load_scores(tmp_path / "s.jsonl"):
        assert r.teacher_log_prob is None and r.entropy_scale is None
        assert np.all(r.gate == 1) and np.all(r.weight == np.float32(r.advantage))


def test_a_dump_is_never_overwritten_or_half_written(tmp_path):
    path = tmp_path / "s.jsonl"
    save_scores(batch(ObjectiveConfig()), path)
    with pytest.raises(RunError, match="never overwritten"):
        save_scores([], path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        save_scores([], tmp_path / "file" / "s.jsonl")


BREAKS = {
    "no JSON": (lambda row: "{", "not an object"),
    "a list": (lambda row: [], "not an object"),
    "a missing field": (lambda row: row.pop("gate") and row, "not an object"),
    "an unknown field": (lambda row: row | {"os.system": 1}, "not an object"),
    "an unknown objective": (lambda row: row | {"objective": {"mixx": 1}}, "not an object"),
    "an objective out of range": (lambda row: row | {"objective": {"mix": 2}}, "objective.mix is 2"),
    "a short column": (lambda row: row | {"gate": [1.0]}, "gate does not hold one value"),
    "text for numbers": (lambda row: row | {"weight": ["a"] * 5}, "not an object"),
    "a number for text": (lambda row: row | {"pieces": [1] * 5}, "must be text"),
    "half a teacher": (lambda row: row | {"teacher_entropy": None}, "teacher_entropy, normalized_entropy"),
    "a turn that is text": (lambda row: row | {"problem": row["problem"] | {"teacher_turns": ["x"]}}, "not an object"),
    "no reward": (lambda row: row | {"reward": None}, "reward is None"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_line_is_named(name, tmp_path):
    path, (change, reason) = tmp_path / "s.jsonl", BREAKS[name]
    save_scores(batch(ObjectiveConfig()), path)
    lines = path.read_text().splitlines()
    row = json.loads(lines[0])
    changed = change(row)
    path.write_text("\n".join([lines[1], changed if isinstance(changed, str) else json.dumps(changed)]))
    with pytest.raises(BadArgument, match="line 2 is no scored rollout") as error:
        load_scores(path)
    assert reason.replace("not an object", "it is not an object") in str(error.value)


def test_a_line_of_another_batch_is_named(tmp_path):
    save_scores([batch(ObjectiveConfig())[0], batch(ObjectiveConfig(lookahead=2))[1]], tmp_path / "s.jsonl")
    with pytest.raises(BadArgument, match="line 2 belongs to another batch"):
        load_scores(tmp_path / "s.jsonl")


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty").write_text("")
    with pytest.raises(BadArgument, match="is empty"):
        load_scores(tmp_path / "empty")
    with pytest.raises(BadArgument, match="cannot read"):
        load_scores(tmp_path / "missing")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.backend_tokenizer.get_vocab_size() - 1), max_size=40))
def test_pieces_join_to_the_response_whatever_the_bytes(ids):
    pieces = token_pieces(TOKENIZER, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20))
def test_a_character_of_several_tokens_belongs_to_its_last(text):
    ids = TOKENIZER.encode(text)
    pieces = token_pieces(TOKENIZER, ids)
    assert "".join(pieces) == text
    for piece, token in zip(pieces, ids, strict=True):
        own = TOKENIZER.decode([token])
        assert piece == own or "�" in own
