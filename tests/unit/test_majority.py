"""The teacher's context "majority": which answer a group agrees on, and what its rollouts then read."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_egrsd.config import DataConfig
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.prompt_builder import PromptBuilder
from megatron_egrsd.data.samples import Problem, Prompt, Rollout, load_rollouts, save_rollouts
from megatron_egrsd.data.siblings import SiblingContexts
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives.interface import rollout_advantages
from megatron_egrsd.objectives.load import load_objective, needs_teacher_prompts
from megatron_egrsd.planning import preflight
from megatron_egrsd.rewards import vote
from megatron_egrsd.rewards.vote import majority_answer
from megatron_egrsd.run.offline_rollouts import load_replay
from megatron_egrsd.sampling import sampler
from megatron_egrsd.sampling.majority import MajorityContexts
from tests.mutants import mutant
from tests.unit.test_prompts import tokenizer  # noqa: F401 (a fixture)

BASE = ["--model.path", "m", "--data.train", "t.jsonl"]
VOTES = [
    (["{4}", "{5}", "{4}"], "4"),
    (["{0.5}", r"{\frac{1}{2}}", "{2}", "{1/2}"], "0.5"),  # three spellings of one value, told in the first
    (["{2}", "{x+1}", "{1+x}"], "x+1"),  # by algebra
    (["{4}", "{5}", "{4}", "{5}"], ""),  # a tie, also behind a third answer
    (["{3}", "{4}", "{5}", "{4}", "{5}"], ""),
    (["{4}", "{4}", "{5}", "{5}", "{5.0}"], "5"),
    (["{3}", "{4}", "{5}"], ""),  # nobody agrees with anybody
    (["{4}"], ""),
    ([], ""),
    (["I see 4 of them", "4 again", "nothing", "{7}", "{7}"], "7"),  # a number in passing is no vote
    (["I see 4 of them", "There are 4 again"], ""),
    (["The answer is 6.", "#### 6", "{5}"], "6"),  # as the reward reads answers
    ([r"\boxed{4} <think> or 5?", "<think>{5}</think> {4}", "{4}", "{5}"], "4"),  # behind the thinking
]


def said(texts: list[str]) -> list[str]:
    return [rf"So \boxed{text}." if text.startswith("{") else text.replace("{", r"\boxed{") for text in texts]


@pytest.mark.parametrize(("texts", "answer"), VOTES)
def test_the_vote(texts, answer):
    assert majority_answer(said(texts)) == answer


@settings(max_examples=200, deadline=None)
@given(st.lists(st.fractions(0, 2, max_denominator=4), max_size=9), st.randoms())
def test_the_vote_is_that_of_the_values_in_any_order_and_spelling(values, random):
    """Counted over fractions: the strict plurality of at least two."""
    counts = {value: values.count(value) for value in values}
    best = [value for value, n in counts.items() if n == max(counts.values()) and n > 1]
    spelled = [random.choice(spellings(value)) for value in values]
    found = majority_answer([rf"\boxed{{{text}}}" for text in spelled])
    assert (found != "") == (len(best) == 1)
    if found:
        assert abs(value_of(found) - best[0]) < Fraction(1, 10**6) and found in spelled


def spellings(value: Fraction) -> list[str]:
    return [str(value), f"{float(value):.8f}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"]


def value_of(text: str) -> Fraction:
    return Fraction(text.replace(r"\frac{", "").replace("}{", "/").replace("}", ""))


MISTAKES = {
    "spellings are counted": ("any(equal(first, reading) for reading in readings)", "first == readings[0]"),
    "the first of a tie": ("len(leaders) == 1", "leaders"),
    "one rollout alone": ("most > 1", "most > 0"),
    "any number votes": ("filter(states_answer, responses)", "responses"),
    "the last spelling": ("votes[answer] = votes.get(answer, 0) + 1",
                          "votes[readings[0]] = votes.pop(answer, 0) + 1"),
    "the least frequent": ("most = max(", "most = min("),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name):
    wrong = mutant(vote, *MISTAKES[name])
    assert any(wrong.majority_answer(said(texts)) != answer for texts, answer in VOTES)


# -- what the teacher reads ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contexts(tokenizer):  # noqa: F811
    def make(**changes) -> MajorityContexts:
        data = DataConfig(teacher_context="majority", student_template="Problem: {problem}", **changes)
        return MajorityContexts(PromptBuilder(tokenizer, data, 100, 512))

    return make


def group(*answers: str, number=0, **changes) -> list[Rollout]:
    problem = Problem("p", "2+3=?", "5", "a solution", [{"role": "user", "content": "read"}])
    prompt = Prompt(problem, [1, 2], [])
    texts = [rf"So \boxed{{{answer}}}" for answer in answers]
    some = {"finish_reason": "stop", "weight_version": 0} | changes
    return [Rollout(prompt, number, [7, 8], [-1.0, -1.0], text=text, **some) for text in texts]


def test_every_rollout_reads_the_answer_of_its_own_group(contexts):
    """Whatever the order of the rollouts; the right answer and the solution are nowhere."""
    make = contexts()
    first, second, split = group("6", "6", "4"), group("7", "3+4", "8", number=1), group("6", "7", number=2)
    rollouts = make([split[0], *first[:2], *second, first[2], split[1]])
    for r in rollouts:
        answer = {0: "6", 1: "7", 2: None}[r.group]
        read = [make.builder.tokenizer.decode(ids) for ids in r.contexts]
        told = f"Problem: 2+3=?\n\nThe most frequent answer of several attempts is {answer}. Reason until you reach it."
        start = "<|im_start|>user\n"
        assert [text.partition("<|im_end|>")[0] for text in read] == ([start + told] if answer else [])
        assert all(ids[-len(make.builder.generation_ids) :] == make.builder.generation_ids for ids in r.contexts)
    assert [r.contexts == [] for r in rollouts] == [True, *[False] * 6, True]


def test_a_rollout_that_was_cut_off_does_not_vote_but_reads(contexts):
    make = contexts()
    rollouts = make([*group("6", "6", "7"), *group("7", "7", finish_reason="length")])
    assert len({tuple(r.contexts[0]) for r in rollouts}) == 1
    assert "is 6. " in make.builder.tokenizer.decode(rollouts[0].contexts[0])


def test_an_answer_that_cannot_be_told_leaves_the_group_without_context(contexts):
    long, forged = group(*["x" * 200] * 2), group(*["5<|im_end|>"] * 2, number=1)
    assert [r.contexts for r in contexts(max_prompt_tokens=100)([*long, *forged])] == [[]] * 4


def test_thinking_that_the_prompt_has_opened_is_no_vote(contexts):
    make = contexts()
    make.builder.opened = "<think>"
    assert [r.contexts for r in make(group("6", "6"))] == [[], []]
    assert len(make(group("6}</think> \\boxed{7", "8}</think> \\boxed{7"))[0].contexts) == 1


def test_a_group_without_majority_is_not_trained_and_a_replay_reads_the_contexts(contexts, tmp_path):
    rollouts = contexts()([*group("6", "6", reward=1.0), *group("6", "7", number=1, reward=1.0)])
    sizes = ["--rollout.prompts_per_step", "2", "--rollout.rollouts_per_prompt", "2"]
    config = parse_config([*BASE, "--objective.preset", "egrsd", "--data.teacher_context", "majority", *sizes])
    assert [bool(a) for a in rollout_advantages(rollouts, load_objective(config.objective), 100)[1]] == [1, 1, 0, 0]
    save_rollouts(rollouts, tmp_path / "r.jsonl")
    assert load_rollouts(tmp_path / "r.jsonl") == rollouts
    assert load_replay(tmp_path / "r.jsonl", config, SimpleNamespace(vocab_size=10_000)) == rollouts
    assert not needs_teacher_prompts(config)


def test_what_is_refused(monkeypatch):
    majority = ["--data.teacher_context", "majority"]
    with pytest.raises(BadArgument, match="rollouts_per_prompt must be at least 2, and is 1"):
        parse_config([*BASE, *majority, "--rollout.rollouts_per_prompt", "1"])
    majority += ["--data.teacher_template", "{answer}"]  # which nobody reads
    config = parse_config([*BASE, *majority, "--rollout.rollouts_per_prompt", "2"])
    preflight._check_contexts(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadArgument, match=r'data\.teacher_context is "majority", which needs math-verify'):
        preflight._check_contexts(config)


@pytest.mark.parametrize(
    ("context", "kind"),
    [("majority", MajorityContexts), ("sibling", SiblingContexts), ("contrast", SiblingContexts), ("answer", None)],
)
def test_the_sampler_of_a_run_makes_the_contexts_that_its_teacher_reads(context, kind, monkeypatch):
    monkeypatch.setattr(sampler, "prompt_builder", lambda config: SimpleNamespace(config=config.data))
    config = parse_config([*BASE, "--data.teacher_context", context, "--rollout.rollouts_per_prompt", "4"])
    made = sampler.group_contexts(config)
    assert made is None if kind is None else type(made) is kind
