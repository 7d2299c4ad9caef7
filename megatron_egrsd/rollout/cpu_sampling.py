"""Sampling with a seed per request on CPU; SGLang's own needs a kernel that is not on PyPI.

A token is a function of its logits, the request's seed and its position. It does not depend on the rest of the batch.
"""

import torch


def multinomial_with_seed(log_probs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Draw one index per row by the Gumbel-max trick; replaces SGLang's function of this name. Returns [N, 1] int64.

    log_probs [N, V] of any float type, -inf is never drawn; seed [N] int64; positions [N] integer, of the token in its
    sequence.
    """
    columns = torch.arange(log_probs.shape[1], device=log_probs.device)
    row = _mix(_mix(seed.long()) + positions.long())
    bits = _mix(row[:, None] + columns)
    uniform = (_shift(bits, 11).double() + 0.5) * 2.0**-53  # in (0, 1)
    gumbel = -torch.log(-torch.log(uniform))
    return torch.argmax(log_probs.double() + gumbel, dim=1, keepdim=True)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Apply SplitMix64's output function (Steele, Lea, Flood 2014) after one step; int64 products wrap around."""
    x = x * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64; odd, so the product is a bijection
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right logically; the `>>` of int64 keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
