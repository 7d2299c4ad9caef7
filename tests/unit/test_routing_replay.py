"""Routes on their way from SGLang's answer to the router, and where replaying them is refused."""

import base64
import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_egrsd.config import Config
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.packing import Sequence, pack
from megatron_egrsd.data.samples import Problem, Prompt, Rollout, load_rollouts, save_rollouts
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.planning.preflight import prepare
from megatron_egrsd.rollout.generation import NO_ROUTE, NOTHING, Generation, parse_generation
from megatron_egrsd.run.offline_rollouts import load_replay
from tests.models import make_qwen3
from tests.parallel.test_algorithm1 import with_tokenizer

LAYERS, CHOSEN = 2, 2
WIDTH = LAYERS * CHOSEN


def answer(experts, sampled: int, reason: str = "stop") -> dict:
    """Return SGLang's answer to a prompt of 3 tokens."""
    tokens = list(range(5, 5 + sampled))
    meta = {
        "finish_reason": {"type": reason, "message": "stopped"},
        "weight_version": "0",
        "prompt_tokens": 3,
        "output_token_logprobs": [[-0.5, token, None] for token in tokens],
        "routed_experts": base64.b64encode(np.asarray(experts, np.int32).tobytes()).decode(),
    }
    return {"output_ids": tokens, "meta_info": meta}


def test_routes_are_one_byte_an_expert():
    experts = np.arange(4 * WIDTH)
    assert parse_generation(answer(experts, 2)).routes == bytes(experts.tolist())
    assert parse_generation(answer([], 2)).routes == b""  # of a server that does not tell
    # The last token of a stopped response is sampled again, and with it the route of the token before it.
    stopped = parse_generation(answer(experts, 2, "abort"), stopping=True)
    assert (stopped.response_ids, stopped.routes) == ([5], bytes(experts[: 3 * WIDTH].tolist()))
    assert parse_generation(answer(experts[:WIDTH], 1, "abort"), stopping=True).routes == b""


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (np.arange(4 * WIDTH - 1), "other tokens"),
        (np.full(4 * WIDTH, NO_ROUTE), "outside"),
        (np.full(4 * WIDTH, -1), "outside"),
    ],
)
def test_routes_that_fit_no_response_are_refused(experts, reason):
    with pytest.raises(ValueError, match=reason):
        parse_generation(answer(experts, 2))
    spoiled = answer(np.arange(4 * WIDTH), 2)
    spoiled["meta_info"]["routed_experts"] = "*"
    with pytest.raises(ValueError, match="other tokens"):
        parse_generation(spoiled)


def test_a_continued_response_keeps_the_routes_that_sampled_it():
    first = Generation([5], [-0.5], "abort", [[0, 1]], b"aaaabbbb")
    more = Generation([6], [-0.5], "stop", [[1, 1]], b"xxxxyyyycccc")
    assert NOTHING.continued(first).continued(more).routes == b"aaaabbbbcccc"


spans = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5)


@given(spans, st.sampled_from([1, 2, 4]), st.data())
def test_every_token_keeps_its_route(lengths, size, data):
    """The experts of a token are named after it, so that a mix-up shows."""
    token, sequences = iter(range(1, 200)), []
    for prompt, response in lengths:
        ids = [next(token) for _ in range(prompt + response)]
        known = data.draw(st.booleans())
        routes = np.array(ids[:-1], np.uint8)[:, None, None].repeat(LAYERS, 1).repeat(CHOSEN, 2) if known else None
        sequences.append(Sequence(ids[:prompt], ids[prompt:], routes))
    whole = pack(sequences, range(len(sequences)), 2 * size, each=2 * size)
    if all(s.routes is None for s in sequences):
        assert whole.routes is None and whole.split(0, size).routes is None
        return
    without = {s.response_ids[-1] for s in sequences} | {
        t for s in sequences if s.routes is None for t in (*s.prompt_ids, *s.response_ids)
    }
    for rank in range(size):
        part = whole.split(rank, size)
        expected = torch.tensor([NO_ROUTE if t in without or t == 0 else t for t in part.tokens.tolist()])
        assert part.routes.shape == (part.tokens.numel(), LAYERS, CHOSEN)
        assert (part.routes == expected[:, None, None]).all()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("routing")
    sizes = {"vocab_size": 61, "num_hidden_layers": LAYERS, "tied": False}
    return {
        "dense": with_tokenizer(make_qwen3(root / "dense", **sizes)),
        "mixture": with_tokenizer(make_qwen3(root / "mixture", num_experts=6, **sizes)),
    }


def configure(model, tmp_path, *words):
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "2+3=?", "answer": "5", "solution": "2+3=5"}\n')
    base = ["--model.path", str(model), "--data.train", str(data), "--output", str(tmp_path / "run")]
    return parse_config([*base, "--rollout.routing_replay", "true", "--rollout.prompts_per_step", "1", *words])


@pytest.mark.parametrize(
    ("model", "words", "reason"),
    [
        ("dense", [], "the model has no experts"),
        ("mixture", ["--objective.preset", "sft"], "trains reference solutions"),
        ("mixture", ["--parallel.megatron", '{"moe_router_fusion": true}'], "moe_router_fusion"),
    ],
)
def test_it_is_refused_where_it_cannot_work(model, words, reason, models, tmp_path):
    with pytest.raises(BadArgument, match=f"routing_replay cannot work: .*{reason}.*; set it to false"):
        prepare(configure(models[model], tmp_path, *words))


def test_a_replay_has_routes_of_this_model(models, tmp_path):
    config, arch = configure(models["mixture"], tmp_path), Architecture.from_pretrained(models["mixture"])
    prompt = Prompt(Problem("p", "p", "a", "s"), [5, 6], [5, 6, 7])
    rollout = Rollout(prompt, 0, [7, 8, 2], [-1.0] * 3, "stop", 0, reward=1.0, routes=bytes([5, 0] * LAYERS * 4))

    def load(routes: bytes, config: Config = config):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        save_rollouts([dataclasses.replace(rollout, routes=routes)], path)
        return load_replay(path, config, arch)

    assert load(rollout.routes) == [rollout]
    for wrong in (b"", bytes([5, 0] * 4), bytes([6, 0] * LAYERS * 4)):  # none, of one layer, of another model
        with pytest.raises(BadArgument, match="line 1: no routes of this model"):
            load(wrong)
    assert load(b"", configure(models["mixture"], tmp_path, "--rollout.routing_replay", "false"))


def test_files_hold_routes_compactly_and_older_files_none(tmp_path):
    prompt, routes = Prompt(Problem("p", "p", "a"), [5, 6], []), bytes(range(4 * WIDTH))
    rollout = Rollout(prompt, 0, [7, 8, 2], [-1.0] * 3, "stop", 0, routes=routes)
    save_rollouts([rollout], tmp_path / "now.jsonl")
    assert load_rollouts(tmp_path / "now.jsonl") == [rollout]
    row = json.loads((tmp_path / "now.jsonl").read_text())
    assert len(row["routes"]) <= len(routes) * 4 / 3 + 3
    for bad in ("*", base64.b64encode(routes[:-1]).decode(), 5, None):
        (tmp_path / "bad.jsonl").write_text(json.dumps(row | {"routes": bad}) + "\n")
        with pytest.raises(BadArgument, match="line 1: not a rollout"):
            load_rollouts(tmp_path / "bad.jsonl")
    del row["routes"]
    (tmp_path / "before.jsonl").write_text(json.dumps(row) + "\n")
    assert load_rollouts(tmp_path / "before.jsonl") == [dataclasses.replace(rollout, routes=b"")]
