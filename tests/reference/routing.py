"""Hugging Face's Qwen3 mixture with the experts of every token given: what routing replay has to compute."""

import base64
import contextlib
from collections.abc import Iterator

import torch


def read_routes(rollout: dict, layers: int) -> torch.Tensor:
    """Return the experts [tokens - 1, layers, k] of a rollout as a dump holds it."""
    tokens = len(rollout["prompt"]["student_ids"]) + len(rollout["response_ids"]) - 1
    return torch.tensor(list(base64.b64decode(rollout["routes"]))).view(tokens, layers, -1)


@contextlib.contextmanager
def routed(model, routes: torch.Tensor | None) -> Iterator[None]:
    """Let `model` send all tokens of a sequence but the last to `routes`; without routes it chooses by itself."""
    gates = [layer.mlp.gate for layer in model.model.layers] if routes is not None else []
    for layer, gate in enumerate(gates):
        gate.forward = lambda hidden, gate=gate, layer=layer: _choose(hidden, gate, routes[:, layer])
    yield
    for gate in gates:
        del gate.forward


def _choose(hidden: torch.Tensor, gate, experts: torch.Tensor):
    logits = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T
    last = logits[-1:].topk(experts.shape[1]).indices
    experts = torch.cat([experts, last])
    chosen = torch.stack([row[own] for row, own in zip(logits, experts, strict=True)])
    weights = chosen.exp() / chosen.exp().sum(1, keepdim=True)
    return logits, weights, experts


def expert_by_expert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name weights as a checkpoint does; transformers keeps those of a layer's experts in two tensors."""
    named = {}
    for name, weight in state.items():
        prefix, found, fused = name.partition("mlp.experts.")
        if not found:
            named[name] = weight
            continue
        parts = {"down_proj": weight}
        if fused == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), weight.chunk(2, 1), strict=True))
        for part, stacked in parts.items():
            named |= {f"{prefix}{found}{e}.{part}.weight": own for e, own in enumerate(stacked)}
    return named
