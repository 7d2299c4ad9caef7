"""The effect of the gate: does the teacher use its reference, where is it uncertain, which tokens carry signal?

Everything here is measured on the initial weights of a task, with transformers, apart from the entropies over training,
which come from the runs that kept their scores.
"""

import dataclasses
import json
import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.mechanism.analysis import by_class, class_means
from benchmarks.validate_method.hypotheses import CONFIG, FAMILY
from benchmarks.validate_method.run import DUMPED
from examples.tiny import make_model as tiny
from megatron_egrsd.config import ObjectiveConfig
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.dump_files import dump_path
from megatron_egrsd.data.samples import is_right
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives.egrsd import confidence
from megatron_egrsd.objectives.interface import batch_tokens
from megatron_egrsd.objectives.signal import History, advantages, shaped_rewards
from megatron_egrsd.report.scored_dump import batch_weights, dumped_tokens, load_scores
from megatron_egrsd.system.files import write_text

GROUP = 8
TYPES = ("result", "operation", "filler", "control", "structure")  # of tokens
UNCERTAIN = 0.5  # a token with a normalised teacher entropy above this counts as uncertain


def token_types(pieces: list[str]) -> list[str]:
    """Return the role of each token of a response: result, operation, filler, control or structure."""
    types = []
    for index, piece in enumerate(pieces):
        since = next((k for k in (1, 2) if index >= k and pieces[index - k] == "="), 0)
        if piece.isdigit():
            types.append("result" if since else "operation")
        elif piece in ("+", "-"):
            types.append("operation")
        elif piece in tiny.FILLER:
            types.append("filler")
        elif piece in (" check ", " good", " wrong", " redo"):
            types.append("control")
        else:
            types.append("structure")
    return types


@dataclasses.dataclass
class Sampled:
    """GROUP responses of the initial student to each problem, end to end: [T] tensors, and bounds of the responses."""

    problems: list[tiny.Steps]
    responses: list[list[int]]
    rewards: list[float]
    cu_seqlens: torch.Tensor


def sampled(model, problems: list[tiny.Steps]) -> Sampled:
    repeated = [p for p in problems for _ in range(GROUP)]
    responses = tiny.sample(model, [tiny.prompt_ids(p) for p in repeated])
    rewards = [tiny.reward(r, p) for r, p in zip(responses, repeated, strict=True)]
    bounds = torch.tensor([0, *map(len, responses)]).cumsum(0, dtype=torch.int32)
    return Sampled(repeated, responses, rewards, bounds)


def signal_of(batch: Sampled, objective: ObjectiveConfig) -> torch.Tensor:
    """Return the advantage of each response after the warm-up, whitened by the statistics of the batch's own rewards.

    They stand for those of earlier steps: at the initial weights these would have the same distribution.
    """
    pairs = zip(batch.rewards, batch.responses, strict=True)
    scored = [SimpleNamespace(reward=reward, right=is_right(reward), response_ids=ids) for reward, ids in pairs]
    shaped = shaped_rewards(scored, objective, tiny.MAX_NEW_TOKENS)
    groups = torch.arange(len(batch.problems)) // GROUP
    history = History(steps=objective.advantage_warmup).after(shaped)
    return advantages(torch.tensor(shaped), groups, objective, history)


def family() -> dict[str, ObjectiveConfig]:
    """Return the objectives that the study compares, by name, with its settings."""
    return {name: parse_config(["--config", CONFIG, *words]).objective for name, words in FAMILY.items()}


def measure(model_path: Path, wrong: bool) -> dict:
    """Measure the gate by token type, and signal and noise of each objective's gradient, on the problems of seed 0."""
    torch.manual_seed(0)
    model = _loaded(model_path)
    batch = sampled(model, tiny.make_problems(random.Random(0))[1])
    references = batch.problems
    if wrong:
        references = [tiny.perturbed(p, random.Random(tiny.problem_text(p))) for p in batch.problems]
    student, _ = tiny.score(model, [tiny.prompt_ids(p) for p in batch.problems], batch.responses)
    prompts = [tiny.prompt_ids(p, r) for p, r in zip(batch.problems, references, strict=True)]
    teacher, entropy = tiny.score(model, prompts, batch.responses)
    members = family()
    scores = dict(teacher_log_prob=teacher, teacher_entropy=entropy, student_log_prob=student)
    tokens = batch_tokens(signal_of(batch, members["grpo"]).tolist(), [len(r) for r in batch.responses], scores)
    weights = {name: batch_weights(tokens, o, len(tiny.VOCABULARY)) for name, o in members.items()}
    h = weights["egrsd"]["normalized_entropy"]
    types = [t for r in batch.responses for t in token_types([tiny.VOCABULARY[i] for i in r])]
    columns = {name: w["weight"] for name, w in weights.items()}
    columns |= {"uncertain": tokens.advantage * (h > UNCERTAIN), "certain": tokens.advantage * (h <= UNCERTAIN)}
    gates = weights["egrsd"]["gate"], weights["cl_egrsd"]["gate"]
    ahead = weights["cl_egrsd"]["lookahead_entropy"]
    # Uncertain tokens whose uncertainty is over within the lookahead (3 tokens), and those where it is sustained.
    resolution = {"transient": (h > UNCERTAIN) & (ahead <= UNCERTAIN), "sustained": ahead > UNCERTAIN}
    means = {"h": h.numpy(), "egrsd": gates[0].numpy(), "cl_egrsd": gates[1].numpy()}
    return {
        "types": by_class(np.array([TYPES.index(t) for t in types]), TYPES, means),
        "resolution": {name: class_means(here.numpy(), means) for name, here in resolution.items()},
        "gradients": _gradients(model, batch, columns),
    }


def _gradients(model, batch: Sampled, columns: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Return the squared norm of the mean of the problems' gradients, and their spread, by column of token weights.

    The norm lacks the bias that the spread gives it (a U-statistic) and has a jackknife error; the spread is the noise.
    """
    parameters = list(model.parameters())
    rows = {name: [] for name in columns}
    for first in range(0, len(batch.responses), GROUP):
        members = range(first, first + GROUP)
        here = slice(int(batch.cu_seqlens[first]), int(batch.cu_seqlens[first + GROUP]))
        prompts = [tiny.prompt_ids(batch.problems[i]) for i in members]
        scored = tiny.response_log_probs(model, prompts, [batch.responses[i] for i in members])
        log_prob = torch.cat([own for _, own in scored])
        for name, weight in columns.items():
            grads = torch.autograd.grad((weight[here] * log_prob).sum(), parameters, retain_graph=True)
            rows[name].append(torch.cat([g.flatten() for g in grads]))
    stacked = {name: torch.stack(r) for name, r in rows.items()}
    return {name: _signal_and_noise(g) for name, g in stacked.items()}


def _signal_and_noise(g: torch.Tensor) -> dict[str, float]:
    products = (g @ g.T).double().numpy()
    n = len(products)
    squares, total = np.diag(products).sum(), products.sum()
    signal = (total - squares) / (n * (n - 1))
    # Without problem i: its row and column leave the sum.
    rest = (total - squares - 2 * (products.sum(1) - np.diag(products))) / ((n - 1) * (n - 2))
    error = np.sqrt((n - 1) / n * ((rest - rest.mean()) ** 2).sum())
    return {"signal": signal, "signal_error": error, "noise": squares / n - signal}


def entropies_over_training(run: Path, steps: tuple[int, ...]) -> list[dict[str, float]]:
    """Return entropy scale in nats, share of uncertain tokens, and mean gates, at single steps, from kept scores."""
    members, rows = family(), []
    for step in steps:
        rollouts = load_scores(dump_path(run / "scores", step))
        tokens = dumped_tokens(rollouts)
        entropy, bounds = tokens.teacher_entropy, tokens.cu_seqlens
        h = torch.cat([torch.from_numpy(r.normalized_entropy) for r in rollouts])
        gates = {name: confidence(entropy, bounds, members[name]).gate.mean().item() for name in ("egrsd", "cl_egrsd")}
        numbers = {"scale": rollouts[0].entropy_scale, "uncertain": (h > UNCERTAIN).float().mean().item()}
        rows.append({"step": step} | numbers | gates)
    return rows


def _loaded(model_path: Path) -> PreTrainedModel:
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


def reading(model_path: Path) -> dict[str, float]:
    """Return make_model's own report: accuracy and length of student and teacher, and how the teacher reads."""
    torch.manual_seed(0)
    model = _loaded(model_path)
    return tiny.measure(model, tiny.make_problems(random.Random(0))[1])


_MODELS = {"tiny": Path("examples/tiny/model"), "doubting": Path("examples/validation/model")}
_CASES = {"tiny": ("tiny", False), "doubting": ("doubting", False), "doubting/wrong": ("doubting", True)}
_STEPS = (1, 5, 10, 15, 20)


def main(output: Path, lanes: int) -> None:
    """Write `output`/mechanism.json. Measurements of the initial weights are kept, and not repeated."""
    tasks: dict[str, dict[str, tuple]] = {
        "reading": {name: (reading, path) for name, path in _MODELS.items()},
        "initial": {name: (measure, _MODELS[model], wrong) for name, (model, wrong) in _CASES.items()},
    }
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(lanes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {
            part: {name: pool.submit(_kept, output / "mechanism" / part / f"{name}.json", *task)
                   for name, task in members.items()}
            for part, members in tasks.items()
        }  # fmt: skip
        result = {part: {name: f.result() for name, f in members.items()} for part, members in futures.items()}
    result["training"] = {}
    for name in sorted(DUMPED):
        try:
            result["training"][name] = entropies_over_training(output / "runs" / name / "seed-0", _STEPS)
        except BadArgument as error:  # the run has failed
            print(f"no entropies over training: {error}", flush=True)
    write_text(output / "mechanism.json", json.dumps(result, indent=1))


def _kept(path: Path, function: Callable, *arguments) -> dict:
    """Return `function(*arguments)` from the file of an earlier call with the same objectives, else call it."""
    settings = {name: dataclasses.asdict(objective) for name, objective in family().items()}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["objectives"] == settings:
            return found["result"]
    except (OSError, ValueError, KeyError):
        pass
    result = function(*arguments)
    write_text(path, json.dumps({"objectives": settings, "result": result}, indent=1))
    return result
