"""Hostile and broken input to every reader: it returns a value or raises an error of one clear sentence.

FUZZ_TOTAL sets the number of inputs for all readers together; `make fuzz` takes 10^5.
"""

import copy
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_egrsd.config import Config, DataConfig
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.problems import BadRows, load_problems
from megatron_egrsd.data.samples import Problem, Prompt, Rollout, load_rollouts, save_rollouts
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.rollout.generation import Generation, parse_generation

TOTAL = int(os.environ.get("FUZZ_TOTAL", "2000"))
pytestmark = pytest.mark.timeout(120 + TOTAL // 20)


@pytest.fixture(autouse=True, scope="module")
def copies():
    """Take the place of the package's: these tests start no process."""


def fuzz(share: float):
    """Return hypothesis settings for `share` of all inputs; parsing a configuration is the slowest, by fifty times."""
    return settings(max_examples=round(TOTAL * share), deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))  # fmt: skip


ROOT = Path(__file__).parents[2]

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["", "nan", "1e999", "-1", "null", "../../etc/passwd", "\ud800", "0x10", "१", 10**400, -0.0]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """Yield every path into nested dictionaries and lists, the root included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def spoiled(draw, valid):
    """Draw `valid` with one to three places replaced, removed, doubled or added."""
    result = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(result))))
        if not path:
            result = draw(values) if draw(st.integers(0, 9)) == 0 else result
            continue
        parent = result
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            parent[path[-1]] = draw(values)
        elif action == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = draw(values)
        else:
            parent.insert(path[-1], draw(values))
    return result


@st.composite
def damaged(draw, content: bytes):
    """Draw `content` with some of its bytes cut, doubled or replaced."""
    result = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(result)))
        stop = draw(st.integers(start, min(len(result), start + 20)))
        result[start:stop] = draw(st.binary(max_size=12)) if draw(st.booleans()) else result[start:stop] * 2
    return bytes(result)


def dumped(value) -> bytes:
    """Return `value` as JSON if JSON can express it, with lone surrogates as escapes."""
    return json.dumps(value).encode()


def check_sentence(error: BaseException) -> None:
    text = str(error)
    assert text.strip() and "\n" not in text and len(text) < 1500, text
    assert "Traceback" not in text and "<class '" not in text, text


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


TINY = (ROOT / "examples/configs/tiny_cpu.yaml").read_bytes()
WORDS = ["--seed", "--steps", "--output", "--rollout.servers.urls", "--objective.mix", "--model",
         "--rollout.servers.args", "--rollout.server_args", "--x.y", "--resume",
          "--data", "--config", "--teacher.weights", "--help_", "--",
         "--optimizer.lr+"]  # fmt: skip


@fuzz(0.04)
@example(TINY, ["1" + "0" * 399] * 4)
@given(damaged(TINY), st.lists(st.sampled_from(WORDS) | st.text(max_size=6) | scalars.map(str), max_size=4))
def test_config(scratch, content, words):
    (scratch / "config.yaml").write_bytes(content)
    try:
        assert isinstance(parse_config(["--config", str(scratch / "config.yaml"), *words]), Config)
    except BadArgument as error:
        check_sentence(error)


ROW = {"id": "a", "problem": "1 + 1 = ?", "answer": "2", "solution": "1 + 1 = 2"}
rows = st.one_of(
    spoiled(ROW).map(dumped), damaged(dumped(ROW)), values.map(dumped), st.binary(max_size=30),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"\xef\xbb\xbf{}", b'{"problem": 1e999}', b"9" * 5000]),
)  # fmt: skip


@fuzz(0.32)
@given(st.lists(rows, max_size=4), st.booleans())
def test_dataset(scratch, lines, skip):
    path = scratch / "data.jsonl"
    path.write_bytes(b"\n".join([dumped(ROW | {"problem": "good"}), *lines]))
    bad = BadRows("skip" if skip else "refuse")
    try:
        problems = load_problems(str(path), DataConfig(), bad=bad)
    except BadArgument as error:
        check_sentence(error)
        assert not skip or "no problems" in str(error), error
        return
    assert all(p.problem.strip() and p.answer.strip() and p.solution.strip() for p in problems)
    for p in problems:
        (p.problem + p.answer + p.solution).encode()
    assert len({" ".join(p.problem.split()) for p in problems}) == len(problems)
    assert skip or not bad.places


PROBLEM = Problem("a", "1 + 1 = ?", "2", "1 + 1 = 2")
ROLLOUT = Rollout(Prompt(PROBLEM, [5, 6], [5, 7, 6]), 0, [8, 9], [-0.5, -0.25], "stop", 3, "2", 1.0)


@pytest.fixture(scope="module")
def rollout_row(scratch):
    save_rollouts([ROLLOUT], scratch / "rollout.jsonl")
    return json.loads((scratch / "rollout.jsonl").read_text())


@pytest.mark.parametrize("key", ["reward", "rollout_log_probs", "response_ids", "group", "weight_version"])
def test_numbers_without_end(key, scratch, rollout_row):
    huge = 10**400
    row = rollout_row | {key: [huge, huge] if isinstance(rollout_row[key], list) else huge}
    (scratch / "huge.jsonl").write_bytes(dumped(row))
    if key in (
        "group",
        "weight_version",
        "response_ids",
    ):  # integers of any size; the batch and vocabulary are checked later
        load_rollouts(scratch / "huge.jsonl")
    else:
        with pytest.raises(BadArgument, match="not a rollout"):
            load_rollouts(scratch / "huge.jsonl")
    with pytest.raises(ValueError, match="no float holds"):
        parse_generation(ANSWER | {"meta_info": ANSWER["meta_info"] | {"output_token_logprobs": [[huge, 5], [0, 2]]}})


@fuzz(0.32)
@given(st.data())
def test_replay(scratch, rollout_row, data):
    line = data.draw(spoiled(rollout_row).map(dumped) | damaged(dumped(rollout_row)) | rows)
    path = scratch / "replay.jsonl"
    path.write_bytes(dumped(rollout_row) + b"\n" + line)
    try:
        rollouts = load_rollouts(path)
    except BadArgument as error:
        check_sentence(error)
        return
    for r in rollouts:
        assert all(type(t) is int and t >= 0 for t in [*r.prompt.student_ids, *r.prompt.teacher_ids, *r.response_ids])
        assert len(r.response_ids) == len(r.rollout_log_probs) > 0 and 0 <= r.reward <= 1
        assert [float(v) for v in r.rollout_log_probs] and r.prompt.student_ids


ANSWER = {
    "text": "", "output_ids": [5, 2],
    "meta_info": {"id": "x", "finish_reason": {"type": "stop", "matched": 2}, "prompt_tokens": 3, "weight_version": "7",
                  "output_token_logprobs": [[-0.5, 5, None], [-0.25, 2, None]], "completion_tokens": 2},
}  # fmt: skip


@fuzz(0.32)
@given(spoiled(ANSWER) | values)
def test_server_answer(answer):
    try:
        generation = parse_generation(answer)
    except ValueError as error:
        check_sentence(error)
        return
    assert isinstance(generation, Generation) and generation.finish_reason in ("stop", "length")
    assert len(generation.response_ids) == len(generation.log_probs) > 0
    assert all(type(t) is int and t >= 0 for t in generation.response_ids)
    assert all(type(v) is float for v in generation.log_probs) and type(generation.weight_version) is int


def test_yaml_that_grows_or_would_run_code(scratch):
    bomb = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}]\n" for p, c in pairwise("abcdefghij"))
    code = "model: !!python/object/apply:os.system ['touch ran']\n"
    for text in (bomb, code, "[" * 3000, "&a [*a]", "model: &m {path: *m}", "\x00", "? ? ?"):
        (scratch / "bad.yaml").write_text(text)
        with pytest.raises(BadArgument) as error:
            parse_config(["--config", str(scratch / "bad.yaml")])
        check_sentence(error.value)
    assert not Path("ran").exists()
