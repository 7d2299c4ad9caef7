"""Sets by name, file and hub; the file of samples; the command's mistakes. No server."""

import contextlib
import itertools
import json
import threading
from pathlib import Path

import pytest

from megatron_egrsd.cli import main
from megatron_egrsd.config import BenchmarksConfig, DataConfig
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data import problems
from megatron_egrsd.data.benchmarks import BENCHMARKS, ProblemSet, load_sets
from megatron_egrsd.data.prompt_builder import prompt_builder
from megatron_egrsd.data.samples import Problem
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.evaluation import evaluate
from megatron_egrsd.evaluation.sample_file import SampleFile
from megatron_egrsd.rewards.answers import gold_answer
from megatron_egrsd.rewards.reward import WORKERS
from megatron_egrsd.rollout.generation import Generation

DATA = Path(__file__).parents[1] / "data"
TINY = Path(__file__).parents[2] / "examples/tiny"
SETTINGS = {"seed": 0}


def row(index=0, **more):
    return {"set": "s", "id": "1", "index": index, "response": "ä"} | more


def load(*sets, data=None, **more):
    return load_sets(BenchmarksConfig(sets=list(sets), **more), data or DataConfig())


def test_named_sets_come_from_the_directory():
    aime, amc = load("aime24", "amc23", directory=str(DATA))
    assert (aime.name, aime.source) == ("aime24", str(DATA / "aime24.jsonl")) and aime.problems
    assert amc.problems[0].answer == "27"


def test_files_of_the_published_fields_are_read_as_they_are():
    (gsm8k,) = load(f"gsm8k={DATA / 'gsm8k_test.jsonl'}")
    assert gsm8k.name == "gsm8k" and gold_answer(gsm8k.problems[0].answer) == "114,200"  # question, answer with ####
    (minerva,) = load(str(DATA / "minerva_math.jsonl"))
    assert minerva.name == "minerva_math" and gold_answer(minerva.problems[0].answer) == "-7"  # boxed in solution


def test_the_users_own_keys_come_first(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"Q": "2+2?", "A": "4", "problem": "other", "answer": "5"}\n')
    (mine,) = load(str(file), data=DataConfig(problem_key="Q", answer_key="A"))
    assert (mine.problems[0].problem, mine.problems[0].answer) == ("2+2?", "4")


@pytest.mark.parametrize("name", [*BENCHMARKS, "org/Set-v1.5:test"])
def test_nothing_is_downloaded_unasked(name, monkeypatch, tmp_path):
    monkeypatch.setattr(problems, "_hub_rows", None)
    with pytest.raises(
        BadArgument, match=r"would be downloaded .*--evaluation\.benchmarks\.hub true, or name a file: [\w.-]+=FILE"
    ):
        load(name, directory=str(tmp_path))


def test_the_hub_is_asked_where_that_is_allowed(monkeypatch):
    asked = []
    rows = [("hub row 1", 1, {"problem_idx": 1, "problem": "2+2?", "answer": "4"})]
    monkeypatch.setattr(problems, "_hub_rows", lambda source: asked.append(source) or iter(rows))
    (hmmt,) = load("hmmt25", hub=True)
    assert hmmt.name == "hmmt25" and len(hmmt.problems) == 1 and set(asked) == {BENCHMARKS["hmmt25"]}
    assert load("org/Set-v1.5:test", hub=True)[0].name == "org--Set-v1.5--test"


BAD_FIRST_AND_LAST = 'no JSON\n{"question": "2+2?", "answer": "4"}\n{"question": "", "answer": "5"}\n'


def test_bad_rows_are_left_out_and_listed(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(BAD_FIRST_AND_LAST)
    (mine,) = load(str(file), data=DataConfig(bad_rows="skip"))
    assert [p.problem for p in mine.problems] == ["2+2?"]
    assert str(mine.bad) == "1 not JSON (line 1), 1 with an empty 'question' (line 3)"
    with pytest.raises(BadArgument, match="line 1: not JSON"):
        load(str(file))


def test_an_evaluation_leaves_out_what_training_leaves_out(tmp_path, capsys, monkeypatch):
    file = tmp_path / "mine.jsonl"
    file.write_text(BAD_FIRST_AND_LAST + json.dumps({"question": 2000 * "1", "answer": "1"}) + "\n")
    words = ["--model.path", str(TINY / "model"), "--output", str(tmp_path / "out")]
    words += ["--rollout.max_response_tokens", "200"]
    left = tmp_path / "out" / ".hf-killed" / "merged"  # by an evaluation of another model
    left.mkdir(parents=True)

    def sample(run, _):
        for _, problem in run.problems:
            for index in range(run.k["mine"]):
                more = {"problem": evaluate._digest(problem.problem, problem.answer), "error": "", "thinking_tokens": 0}
                more |= {"reward": 1.0, "tokens": 2, "finish_reason": "stop", "states_answer": True, "vote": "4"}
                run.file.append(row(index, **more, set="mine", id=problem.id))

    monkeypatch.setattr(evaluate.Evaluation, "sample", sample)
    assert main(["evaluate", str(file), *words, "--data.bad_rows", "skip"]) == 0
    left_out = "1 not JSON (line 1), 1 with an empty 'question' (line 3), 1 over-long (problem 4)"
    assert f"1 problems; left out are {left_out}" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/results.json").read_text())["sets"]["mine"]
    assert found["problems"] == 1 and found["accuracy"]["value"] == 1.0
    assert not left.parent.exists()


class Client:
    """A stand-in for RolloutClient: every response is one token."""

    def generate(self, prompts, n, *, finished, **_):
        for i, j in itertools.product(range(len(prompts)), range(n)):
            finished(i, j, Generation([5], [-0.5], "stop", [[0, 1]]))


@pytest.mark.skipif(WORKERS == 1, reason="one processor grades one response at a time")
def test_responses_are_graded_side_by_side(tmp_path, monkeypatch):
    """No response gets its reward before another one is asked for; otherwise the test would wait for ever."""
    monkeypatch.setattr(evaluate, "RolloutServers", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(evaluate, "RolloutClient", lambda *_: Client())
    monkeypatch.setattr(evaluate, "check_deterministic", lambda _: None)
    words = ["--model.path", str(TINY / "model"), "--evaluation.rollouts_per_problem", "2"]
    config = parse_config([*words, "--data.train", "-", "--rollout.max_response_tokens", "200"])
    both = threading.Barrier(2, timeout=20)
    with SampleFile(tmp_path / "samples.jsonl", SETTINGS) as file:
        sets = [ProblemSet("s", "s", [Problem("1", "1 + 1 =", "2")])]
        run = evaluate.Evaluation(config, sets, prompt_builder(config), lambda *_: float(both.wait() >= 0), file)
        run.sample(config.model)
        assert [found["reward"] for found in file.rows.values()] == [1.0, 1.0]


def test_samples_of_other_settings_are_refused_before_a_checkpoint_is_converted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "hugging_face", None)
    with SampleFile(tmp_path / "samples.jsonl", {}) as file:
        file.append(row())
    words = ["--model.path", str(TINY / "model"), "--output", str(tmp_path), "--rollout.max_response_tokens", "200"]
    assert main(["evaluate", str(TINY / "heldout.jsonl"), *words]) == 2
    assert "was sampled with model = None" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["model.path", "lora.init"])
def test_an_output_within_the_model_is_refused(source, tmp_path, capsys):
    """Its samples would count as files of the model, and the same command could not continue."""
    words = ["--model.path", str(TINY / "model"), f"--{source}", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(TINY / "heldout.jsonl"), *words]) == 2
    assert f"lies within {source}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_no_set(tmp_path):
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"id": 1, "problem": "a", "answer": "1"}\n{"id": 1, "problem": "b", "answer": "2"}\n')
    for sets, message in [
        ((), "no set to evaluate on"),
        (("aime2024",), "neither a .jsonl nor a .parquet file"),
        ((str(tmp_path / "no.jsonl"),), "there is no file"),
        ((str(DATA / "aime24.jsonl"), f"aime24={DATA / 'amc23.jsonl'}"), "two sets are called aime24"),
        ((str(twice),), "two problems have the id '1'"),
    ]:
        with pytest.raises(BadArgument, match=message):
            load(*sets)


def test_samples_survive_and_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "out" / "samples.jsonl"
    with SampleFile(path, SETTINGS) as file:
        file.append(row(0))
        file.append(row(1))
    whole = path.read_bytes()
    for cut in (1, 5, len(whole.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(whole[:-cut])
        with SampleFile(path, SETTINGS) as file:
            assert list(file.rows) == [("s", "1", 0)]
            file.append(row(1))
        assert path.read_bytes() == whole
    path.write_bytes(whole[:10])  # torn in the first line
    with SampleFile(path, SETTINGS) as file:
        assert not file.rows
    assert json.loads(path.read_bytes()) == {"settings": SETTINGS}


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "samples.jsonl"
    for content, message in [
        ("hello\n", "line 1: not a line"),
        ('{"settings": {"seed": 0}}\n{"set": "s"}\n', "line 2: not a line"),
        ('{"settings": {"seed": 0}}\n[]\n', "line 2: not a line"),
        ('{"settings": {"seed": 1}}\n{"set": "s", "id": "1", "index": 0}\n', "seed = 1, not 0; choose another output"),
    ]:
        path.write_text(content)
        with pytest.raises(BadArgument, match=message):
            SampleFile(path, SETTINGS)
        assert path.read_text() == content


def test_settings_without_samples_bind_nothing(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"settings": {"seed": 1}}\n')
    SampleFile(path, SETTINGS).close()
    assert json.loads(path.read_bytes()) == {"settings": SETTINGS}


def test_two_processes_do_not_write_one_file(tmp_path):
    with (
        SampleFile(tmp_path / "samples.jsonl", SETTINGS),
        pytest.raises(BadArgument, match="another process is writing"),
    ):
        SampleFile(tmp_path / "samples.jsonl", SETTINGS)


def test_a_full_disk_is_one_sentence():
    with open("/dev/full", "r+b", buffering=0) as full, pytest.raises(RunError, match="No space left"):
        file = SampleFile.__new__(SampleFile)
        file.path, file.file, file.rows = Path("samples.jsonl"), full, {}
        file.append(row())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["aime24"], "would be downloaded"),
        ([], "no set to evaluate on"),
        ([str(TINY / "heldout.jsonl"), "--evaluation.top_p", "0"], "evaluation.top_p is 0"),
        ([str(TINY / "heldout.jsonl"), "--model.path", "nowhere"], "nowhere"),
        ([str(TINY / "heldout.jsonl"), "--model.path", str(DATA)], "model.path: "),
        ([str(TINY / "heldout.jsonl"), "--evaluation.tmperature", "1"], "did you mean evaluation.temperature"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(words, message, tmp_path, capsys):
    options = ["--model.path", str(TINY / "model"), "--output", str(tmp_path / "out")]
    options += ["--rollout.max_response_tokens", "200"]
    sets = [w for w in words[:1] if not w.startswith("-")]
    assert main(["evaluate", *sets, *options, *words[len(sets) :]]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_file_whose_path_holds_an_equals_sign_is_that_file(tmp_path):
    place = tmp_path / "lr=1e-6" / "test.jsonl"
    place.parent.mkdir()
    place.write_text('{"problem": "p", "answer": "1"}\n')
    (found,) = load(str(place))
    assert (found.name, found.source) == ("test", str(place))
    (named,) = load(f"mine={place}")
    assert (named.name, named.source) == ("mine", str(place))
