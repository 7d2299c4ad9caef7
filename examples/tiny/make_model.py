"""Make the tiny Qwen3 and its task from nothing, in minutes on one core.

The task is mental arithmetic: five additions and subtractions of one digit, every intermediate result
between 10 and 99. The model is warm-started on verbose, often wrong chains of thought without a reference and
on concise ones with a reference in the prompt. Many of those references are *wrong* or belong to *another
problem*, and the response follows them: their numbers cannot be computed from the problem, so the network
learns to read. With the right reference it is its own privileged teacher, concise and right.

Writes ``model/`` (Hugging Face format), ``train.jsonl`` and ``heldout.jsonl`` and prints what it measured.

With ``--doubt`` the teacher is one that works the problem out as well and is torn if a reference lies: it then
follows the reference, the problem, or neither, so that its entropy is high there and low elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_egrsd.hf.staging import staged
from megatron_egrsd.system.files import write_text

TEACHER_TEMPLATE = "{problem}\nref:{solution}"
PROBLEM_LENGTH = 5
MAX_NEW_TOKENS = 240

_WORDS = ("hmm", "let", "me", "see", "so", "ok", "maybe", "well", "now", "then", "right", "um", "think", "about")
FILLER = [f" {word}" for word in (*_WORDS, "this", "again")]
CONTROL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
REASONING = ["<think>", "</think>"]
SYNTAX = ["user", "assistant", "\n", "ref:", ";", "=", "+", "-", "?", " check ", " good", " wrong", " redo"]
VOCABULARY = [*CONTROL, *REASONING, *SYNTAX, *FILLER, *"0123456789"]
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}
PAD_ID, END_ID = TOKEN_ID["<pad>"], TOKEN_ID["<|im_end|>"]

# Qwen3's template for user and assistant turns; variables it does not use (enable_thinking) are ignored.
CHAT_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer whose tokens carry their own spaces: decoding is plain concatenation."""
    tokenizer = Tokenizer(models.WordLevel(vocab=TOKEN_ID, unk_token="<unk>"))
    longest_first = sorted(VOCABULARY, key=len, reverse=True)
    known_token = Regex("|".join(re.escape(token).replace("\\\n", "\\n") for token in longest_first))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(known_token, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in REASONING])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<|im_end|>"}
    options = {"clean_up_tokenization_spaces": False, "model_max_length": 1024, "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **names, **options)


def encode(tokens: list[str]) -> list[int]:
    return [TOKEN_ID[token] for token in tokens]


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of a solution, for example 47+3=50. ``result`` need not be right: a reference may lie."""

    left: int
    operator: str
    operand: int
    result: int

    def apply(self, value: int) -> int:
        """Return the true result of this step's operation on ``value`` (modulo 100, to stay at two digits)."""
        return (value + self.operand if self.operator == "+" else value - self.operand) % 100

    def text(self) -> str:
        return f"{self.left:02d}{self.operator}{self.operand}={self.result:02d}"


Steps = list[Step]


def random_steps(rng: random.Random, length: int = PROBLEM_LENGTH) -> Steps:
    """Draw a problem with its right solution; every value lies between 10 and 99."""
    value, steps = rng.randint(10, 99), []
    while len(steps) < length:
        operator, operand = rng.choice("+-"), rng.randint(2, 9)
        result = value + operand if operator == "+" else value - operand
        if 10 <= result <= 99:
            steps.append(Step(value, operator, operand, result))
            value = result
    return steps


def perturbed(steps: Steps, rng: random.Random) -> Steps:
    """Return the same operations with at least one result replaced by a random number; later steps build on it."""
    lies = {index for index in range(len(steps)) if rng.random() < 0.3} or {rng.randrange(len(steps))}
    value, changed = steps[0].left, []
    for index, step in enumerate(steps):
        result = rng.randint(10, 99) if index in lies else step.apply(value)
        changed.append(Step(value, step.operator, step.operand, result))
        value = result
    return changed


def torn(problem: Steps, reference: Steps, doubt: float, rng: random.Random) -> Steps:
    """Return a doubting teacher's solution: if the reference is wrong, its result, the right one or a random one."""
    value, worked = problem[0].left, []
    for step, said in zip(problem, reference, strict=True):
        result = step.apply(value)
        if said.left == value and said.result != result:
            draw = rng.random()
            if draw >= doubt:
                result = said.result
            elif draw >= doubt / 2:
                result = rng.randint(10, 99)
        worked.append(Step(value, step.operator, step.operand, result))
        value = result
    return worked


def make_problems(rng: random.Random) -> tuple[list[Steps], list[Steps]]:
    """Draw 1,500 problems to train on and 128 held out, all distinct."""
    distinct: dict[str, Steps] = {}
    while len(distinct) < 1500 + 128:
        steps = random_steps(rng)
        distinct[problem_text(steps)] = steps
    problems = list(distinct.values())
    return problems[:1500], problems[1500:]


def problem_text(steps: Steps) -> str:
    return f"{steps[0].left:02d}" + "".join(f"{step.operator}{step.operand}" for step in steps) + "=?"


def solution_text(steps: Steps) -> str:
    return ";".join(step.text() for step in steps)


def prompt_ids(problem: Steps, reference: Steps | None = None, answer_only: bool = False) -> list[int]:
    """Return the chat template over the problem, as token ids: the student's prompt, or the teacher's."""
    content = [*problem_text(problem)]
    if reference is not None:
        content += ["\n", "ref:", *(f"{reference[-1].result}" if answer_only else solution_text(reference))]
    user, assistant = ["<|im_start|>", "user", "\n"], ["<|im_start|>", "assistant", "\n"]
    return encode([*user, *content, "<|im_end|>", "\n", *assistant])


def reward(response: list[int], problem: Steps) -> float:
    """Return 1 if the response is finished and the answer follows ``</think>``, else 0."""
    return float(response[-5:] == encode(["</think>", "\n", *f"{problem[-1].result}", "<|im_end|>"]))


@dataclasses.dataclass(frozen=True)
class Style:
    """Probabilities that shape a chain of thought."""

    filler: float  # a step is preceded by a few words that say nothing
    check: float  # a step with a right result is checked
    recheck: float  # one more check after a check
    redo: float  # after a step the chain starts again (once)
    mistake: float  # a step's result is wrong
    check_mistake: float  # a step with a wrong result is checked
    catch: float  # such a check finds the mistake
    learn_mistakes: bool  # whether wrong results are training targets, or only context to recover from


_VERBOSE = {"filler": 0.3, "check": 0.35, "recheck": 0.4, "redo": 0.07}
_CONCISE = {"filler": 0.06, "check": 0.06, "recheck": 0.05, "redo": 0.0}
STUDENT = Style(**_VERBOSE, mistake=0.1, check_mistake=0.35, catch=0.8, learn_mistakes=True)
TEACHER = Style(**_CONCISE, mistake=0.1, check_mistake=1.0, catch=1.0, learn_mistakes=False)


class Chain:
    """A chain of thought being written: its tokens, which of them are training targets, its answer."""

    def __init__(self, steps: Steps, style: Style, rng: random.Random):
        self.tokens: list[str] = []
        self.is_target: list[bool] = []
        self._style, self._rng = style, rng
        self._write(["<think>", "\n"])
        if not self._try(steps, may_redo=True):
            self._try(steps, may_redo=False)
        self._write(["</think>", "\n", *f"{self.answer:02d}", "<|im_end|>"])

    def _write(self, tokens: list[str], is_target: bool = True) -> None:
        self.tokens += tokens
        self.is_target += [is_target] * len(tokens)

    def _try(self, steps: Steps, may_redo: bool) -> bool:
        """Work through ``steps``; returns False if the chain gives up and wants to start again."""
        style, chance = self._style, self._rng.random
        value = steps[0].left
        for step in steps:
            if chance() < style.filler:
                self._write([*self._rng.choices(FILLER, k=self._rng.randint(3, 8)), ";"])
            value = self._work_out(step, value)
            if may_redo and chance() < style.redo:
                self._write([" redo", ";"])
                return False
        self.answer = value
        return True

    def _work_out(self, step: Step, value: int) -> int:
        """Work out one step from ``value``, with checks; returns the result that the chain goes on with."""
        style, chance = self._style, self._rng.random
        right = step.result if value == step.left else step.apply(value)
        slip = self._rng.choice([1, -1, 10, -10, self._rng.randint(1, 99)]) if chance() < style.mistake else 0
        result = (right + slip) % 100
        question = f"{value:02d}{step.operator}{step.operand}="
        self._write([*question])
        self._write([*f"{result:02d}"], is_target=style.learn_mistakes or result == right)
        self._write([";"])
        check = style.check if result == right else style.check_mistake
        while chance() < check:
            found = result != right and chance() < style.catch
            result = right if found else result
            self._write([" check ", *question, *f"{result:02d}", " wrong" if found else " good", ";"])
            check = style.recheck
        return result


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The mixture of examples in the warm start; the defaults are the committed model's."""

    doubt: float = 0.0  # if a reference lies, the share of responses that do not follow it
    answer_only: float = 0.0  # of the references that do not, those that give only the answer
    lies: float = 0.15  # of all examples, those whose reference is the problem's own with wrong results in it


def random_example(rng: random.Random, mixture: Mixture = Mixture()) -> tuple[list[int], list[int]]:
    """Draw inputs and targets (-100: nothing to learn). Half have a reference; half of the references lie."""
    problem = random_steps(rng, rng.randint(2, PROBLEM_LENGTH))
    draw, reference = rng.random(), problem
    if draw < 0.5:
        reference = None
    elif draw < 0.5 + mixture.lies:
        reference = perturbed(problem, rng)
    elif draw < 0.6 + mixture.lies:
        reference = random_steps(rng, len(problem))
    lies = reference is not None and reference != problem
    followed = reference
    if lies and mixture.doubt and draw < 0.5 + mixture.lies:
        followed = torn(problem, reference, mixture.doubt, rng)
    answer_only = not lies and bool(mixture.answer_only) and rng.random() < mixture.answer_only
    chain = Chain(followed, TEACHER, rng) if followed else Chain(problem, STUDENT, rng)
    prompt, response = prompt_ids(problem, reference, answer_only), encode(chain.tokens)
    targets = [token if learn else -100 for token, learn in zip(response, chain.is_target, strict=True)]
    # The logits at position t predict token t + 1: inputs lack the last token, targets the first.
    return (prompt + response)[:-1], [-100] * (len(prompt) - 1) + targets


def make_model() -> Qwen3ForCausalLM:
    """Build a model of a third of a million parameters; heads, KV heads and layers divide by two for TP=2, PP=2."""
    layers = {"num_hidden_layers": 4, "hidden_size": 96, "intermediate_size": 192, "initializer_range": 0.04}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    positions = {"max_position_embeddings": 1024, "rope_theta": 10000.0}
    tokens = {"bos_token_id": None, "eos_token_id": END_ID, "pad_token_id": PAD_ID, "tie_word_embeddings": True}
    config = Qwen3Config(vocab_size=len(VOCABULARY), **tokens, **layers, **attention, **positions)
    return Qwen3ForCausalLM(config)


def pad_right(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def warm_start(
    model: Qwen3ForCausalLM, steps: int, rng: random.Random, mixture: Mixture = Mixture(), batch_size: int = 32
) -> None:
    """Train on fresh examples, supervised; batches of similar length, linear warm-up and decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 50, 2 * (1 - s / steps)))
    model.train()
    batches, started = [], time.monotonic()
    for step in range(steps):
        if not batches:
            pool = sorted((random_example(rng, mixture) for _ in range(8 * batch_size)), key=lambda pair: len(pair[0]))
            batches = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
            rng.shuffle(batches)
        inputs, targets = zip(*batches.pop(), strict=True)
        logits = model(pad_right(inputs, PAD_ID)).logits  # causal and padded on the right: needs no mask
        loss = F.cross_entropy(logits.flatten(0, 1), pad_right(targets, -100).flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if (step + 1) % 200 == 0:
            seconds = time.monotonic() - started
            print(f"warm start {step + 1}/{steps}: loss {loss:.3f}, {seconds:.0f} s", flush=True)
    model.eval()


@torch.inference_mode()
def sample(model: Qwen3ForCausalLM, prompts: list[list[int]], batch_size: int = 256) -> list[list[int]]:
    """Sample one response per prompt at temperature 1, ending with <|im_end|> unless it was cut off."""
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    responses = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD_ID] * (width - len(row)) + row for row in rows])
        output = model.generate(ids, attention_mask=ids != PAD_ID, max_new_tokens=MAX_NEW_TOKENS, **plain)
        for row in output[:, width:].tolist():
            responses.append(row[: row.index(END_ID) + 1] if END_ID in row else row)
    return responses


def response_log_probs(
    model: Qwen3ForCausalLM, prompts: Sequence[list[int]], responses: Sequence[list[int]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield, of each response, log-probs of all tokens [tokens, vocabulary] and of its own [tokens]."""
    logits = model(pad_right([p + r for p, r in zip(prompts, responses, strict=True)], PAD_ID)).logits
    for row, prompt, response in zip(logits.log_softmax(-1), prompts, responses, strict=True):
        row = row[len(prompt) - 1 : len(prompt) + len(response) - 1]
        yield row, row.gather(1, torch.tensor(response)[:, None])[:, 0]


@torch.inference_mode()
def score(
    model: Qwen3ForCausalLM, prompts: list[list[int]], responses: list[list[int]], batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability of every response token and entropy of its distribution, both packed to [tokens]."""
    log_probs, entropies = [], []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        for every, own in response_log_probs(model, prompts[batch], responses[batch]):
            log_probs.append(own)
            entropies.append(-(every.exp() * every).sum(-1))
    return torch.cat(log_probs), torch.cat(entropies)


def contradicted(response: list[int], reference: Steps) -> list[bool]:
    """Return for each token whether the response departs here from the reference's words for the same step.

    That is the first digit of a result that differs, if the response states the result for the first time; the
    response has itself settled the other digit and every check that follow.
    """
    said = {step.text()[:-2]: step.text()[-2:] for step in reference}
    tokens = [VOCABULARY[index] for index in response]
    marks = [False] * len(tokens)
    for start in range(len(tokens) - 6):
        step = "".join(tokens[start : start + 5])  # "47+3=": one token a character
        result = said.pop(step, "")
        differs = [offset for offset, digit in enumerate(result) if tokens[start + 5 + offset] != digit]
        if differs:
            marks[start + 5 + differs[0]] = True
    return marks


def reading(model: Qwen3ForCausalLM, problems: list[Steps], responses: list[list[int]]) -> dict[str, float]:
    """Measure how the teacher reads its reference: compares the right one with another problem's.

    ``correlation`` is Pearson's, over all response tokens, between log pi_T - log pi_S under the right
    reference and under another problem's. Normalised entropy is H / q95(H), clipped to [0, 1]; "wrong" is under
    a reference to the same operations some results of which are wrong.
    """
    others = problems[1:] + problems[:1]
    lies = [perturbed(p, random.Random(str(i))) for i, p in enumerate(problems)]
    student, _ = score(model, [prompt_ids(p) for p in problems], responses)
    scores = {}
    for name, references in (("right", problems), ("other", others), ("wrong", lies)):
        scores[name] = score(model, [prompt_ids(p, q) for p, q in zip(problems, references, strict=True)], responses)
    ratios = {name: log_prob - student for name, (log_prob, _) in scores.items()}
    report = {"correlation": torch.corrcoef(torch.stack([ratios["right"], ratios["other"]]))[0, 1]}
    for name, references in (("right", problems), ("wrong", lies)):
        entropy = scores[name][1]
        normalized = (entropy / entropy.quantile(0.95)).clamp(0, 1)
        marks = torch.tensor([m for pair in zip(responses, references, strict=True) for m in contradicted(*pair)])
        report[f"{name} reference: contradicted tokens"] = marks.float().mean()
        for where, selected in (("contradicted", marks), ("elsewhere", ~marks)):
            report[f"{name} reference: log-ratio, {where}"] = ratios[name][selected].mean()
            report[f"{name} reference: normalised entropy, {where}"] = normalized[selected].mean()
    return {name: value.item() for name, value in report.items()}


def measure(model: Qwen3ForCausalLM, problems: list[Steps]) -> dict[str, float]:
    """Return avg@8, mean length and truncation of teacher and student, and how the teacher reads the student."""
    report = {}
    problems = problems * 8
    for role in ("teacher", "student"):
        responses = sample(model, [prompt_ids(p, p if role == "teacher" else None) for p in problems])
        rewards = [reward(response, p) for response, p in zip(responses, problems, strict=True)]
        report[f"{role} avg@8"] = sum(rewards) / len(rewards)
        report[f"{role} length"] = sum(map(len, responses)) / len(responses)
        report[f"{role} truncated"] = sum(row[-1] != END_ID for row in responses) / len(responses)
    return report | reading(model, problems, responses)  # of the student's responses


def write_problems(path: Path, problems: list[Steps], wrong: float = 0.0) -> None:
    """Write `problems`, with a share `wrong` of the solutions perturbed; the answers are not."""
    rng = random.Random("wrong references")
    lines = []
    for index, steps in enumerate(problems):
        solution = perturbed(steps, rng) if rng.random() < wrong else steps
        row = {"id": f"{path.stem}-{index}", "problem": problem_text(steps)}
        row |= {"answer": f"{steps[-1].result}", "solution": solution_text(solution)}
        lines.append(json.dumps(row) + "\n")
    write_text(path, "".join(lines))


def write_model(path: Path, model: Qwen3ForCausalLM) -> None:
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=END_ID, pad_token_id=PAD_ID)
    model.save_pretrained(path)
    (path / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    make_tokenizer().save_pretrained(path)
    # The class name that every transformers release knows; 5.x writes one of its own.
    config_path = path / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1600, help="warm-start steps of 32 examples")
    parser.add_argument("--doubt", type=float, default=Mixture.doubt, help="share of responses that follow no lie")
    parser.add_argument("--answer-only", type=float, default=Mixture.answer_only,
                        help="share of right references that give only the answer")  # fmt: skip
    parser.add_argument("--lies", type=float, default=Mixture.lies, help="share of examples with a reference that lies")
    parser.add_argument("--start", type=Path, help="start from this model instead of random weights")
    parser.add_argument("--wrong-references", type=float,
                        help="also write train_wrong_references.jsonl, with this share of them wrong")  # fmt: skip
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    train, heldout = make_problems(rng)
    model = Qwen3ForCausalLM.from_pretrained(arguments.start) if arguments.start else make_model()
    print(f"{model.num_parameters():,} parameters, {len(VOCABULARY)} tokens")
    warm_start(model, arguments.steps, rng, Mixture(arguments.doubt, arguments.answer_only, arguments.lies))
    for name, value in measure(model, heldout).items():
        print(f"{name:50s} {value:8.3f}")

    write_problems(arguments.output / "train.jsonl", train)
    write_problems(arguments.output / "heldout.jsonl", heldout)
    if arguments.wrong_references:
        write_problems(arguments.output / "train_wrong_references.jsonl", train, arguments.wrong_references)
    shutil.rmtree(arguments.output / "model", ignore_errors=True)
    with staged(arguments.output / "model") as directory:
        write_model(directory, model)


if __name__ == "__main__":
    main()
