"""Algorithm 1 of EGRSD (arXiv 2605.13255, appendix K), written a second time: Hugging Face, PEFT and PyTorch in fp64.

No line of the package is used, and nothing is packed, sharded or fused: one rollout at a time, and for the weights one
token at a time. tests/parallel/test_algorithm1.py holds the trainer against it.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from tests.reference.routing import expert_by_expert, read_routes, routed

EXACT = {"dtype": torch.float64, "attn_implementation": "eager", "experts_implementation": "eager"}


@dataclass
class Settings:
    """The paper's symbols; the values of its Qwen3-4B CL-EGRSD run but for what a test has to choose."""

    gamma: float = 0.3
    lookahead: int = 3  # W; 0 is EGRSD
    epsilon: float = 0.2
    floor: float = 0.1
    length_bonus: float = 0.5  # beta_L
    longest: int = 1024  # L_max
    warmup_steps: int = 10
    baseline: float = 0.5
    temperature: float = 1.1
    lr: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    clip_norm: float = 0.1


@dataclass
class Step:
    """The numbers of one step; weights and entropies by rollout, each a list over its response tokens."""

    loss: float
    grad_norm: float
    rewards: list[float]
    advantages: list[float]
    weights: list[list[float]] = field(default_factory=list)
    gates: list[list[float]] = field(default_factory=list)


def read_rollouts(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def train(
    model: Path, batches: list[list[dict]], settings: Settings, adapter: Path | None = None
) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """Take one step on each batch of rollouts; returns the steps and the final weights by Hugging Face name.

    With an `adapter`, PEFT trains it in place of the weights; returns its final tensors by PEFT's names.
    """
    student = load_student(model, adapter)
    teacher = load_student(model).eval()  # frozen: the initial weights
    optimizer = torch.optim.AdamW(
        trained(student), lr=settings.lr, betas=settings.betas, eps=settings.adam_epsilon, weight_decay=0.0
    )
    earlier_rewards: list[float] = []
    steps = []
    for number, batch in enumerate(batches):
        steps.append(_step(student, teacher, optimizer, batch, number, earlier_rewards, settings))
        earlier_rewards += steps[-1].rewards  # after the update (line 20)
    return steps, final_weights(student)


def load_student(model: Path, adapter: Path | None = None):
    """Load the model in fp64, with a trainable `adapter` if one is given."""
    student = AutoModelForCausalLM.from_pretrained(model, **EXACT)
    if adapter:
        student = PeftModel.from_pretrained(student, adapter, is_trainable=True, autocast_adapter_dtype=False).double()
    return student


def trained(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def update(student, optimizer: torch.optim.Optimizer, loss: torch.Tensor, clip_norm: float) -> tuple[float, float]:
    """Take one step down the gradient of `loss`; returns the loss, and the gradient's norm before it is clipped."""
    optimizer.zero_grad()
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(trained(student), clip_norm))
    optimizer.step()
    return float(loss.detach()), norm


def final_weights(student) -> dict[str, torch.Tensor]:
    """Return the weights by Hugging Face's names, or an adapter's tensors by PEFT's."""
    adapted = isinstance(student, PeftModel)
    state = get_peft_model_state_dict(student) if adapted else expert_by_expert(student.state_dict())
    return {name: weight.detach().clone() for name, weight in state.items()}


def _step(student, teacher, optimizer, batch: list[dict], number: int, earlier: list[float], s: Settings) -> Step:
    rewards = [_reward(rollout, s) for rollout in batch]
    advantages = [_advantage(reward, number, earlier, s) for reward in rewards]

    teacher_log_prob, entropies = [], []
    with torch.no_grad():
        for rollout in batch:
            log_probs = log_probs_of(teacher, rollout["prompt"]["teacher_ids"], rollout["response_ids"], s.temperature)
            teacher_log_prob.append(_of_sampled(log_probs, rollout["response_ids"]))
            entropies.append([-float((row.exp() * row).sum()) for row in log_probs])
    largest = max(1.0, max(h for response in entropies for h in response))

    number_of_tokens = sum(len(rollout["response_ids"]) for rollout in batch)
    loss, step = 0.0, Step(0.0, 0.0, rewards, advantages)
    for rollout, advantage, from_teacher, entropy in zip(batch, advantages, teacher_log_prob, entropies, strict=True):
        routes = read_routes(rollout, student.config.num_hidden_layers) if rollout.get("routes") else None
        with routed(student, routes):
            prompt, response = rollout["prompt"]["student_ids"], rollout["response_ids"]
            log_probs = log_probs_of(student, prompt, response, s.temperature)
        log_prob = _of_sampled(log_probs, rollout["response_ids"])
        direction = (advantage > 0) - (advantage < 0)
        weights, gates = [], []
        for t in range(len(entropy)):
            window = entropy[t : t + s.lookahead + 1]  # up to t + W, and not beyond the response's end
            gate = min(max(1 - s.gamma * min(window) / largest, s.floor), 1.0)
            ratio = math.exp(direction * (float(from_teacher[t]) - float(log_prob[t].detach())))
            magnitude = min(max(ratio, 1 - s.epsilon), 1 + s.epsilon)
            gates.append(gate)
            weights.append(advantage * magnitude * gate)
        loss = loss - (torch.tensor(weights, dtype=torch.float64) * log_prob).sum() / number_of_tokens
        step.weights.append(weights)
        step.gates.append(gates)
    step.loss, step.grad_norm = update(student, optimizer, loss, s.clip_norm)
    return step


def _reward(rollout: dict, s: Settings) -> float:
    correct = rollout["reward"] > 0.5
    return 1.0 + s.length_bonus * (1 - len(rollout["response_ids"]) / s.longest) if correct else 0.0


def _advantage(reward: float, number: int, earlier: list[float], s: Settings) -> float:
    if number < s.warmup_steps:
        return reward - s.baseline
    mean = sum(earlier) / len(earlier) if earlier else 0.0
    variance = sum((r - mean) ** 2 for r in earlier) / (len(earlier) - 1) if len(earlier) > 1 else 0.0
    return (reward - mean) / (math.sqrt(variance) + 1e-6)


def log_probs_of(model, prompt_ids: list[int], response_ids: list[int], temperature: float) -> torch.Tensor:
    """Log-probs [T, V] of the next token before each response token, at the temperature."""
    logits = model(torch.tensor([prompt_ids + response_ids])).logits[0]
    return (logits[len(prompt_ids) - 1 : -1] / temperature).log_softmax(-1)


def _of_sampled(log_probs: torch.Tensor, response_ids: list[int]) -> torch.Tensor:
    return log_probs.gather(1, torch.tensor(response_ids)[:, None])[:, 0]
