"""Rotary embeddings that are scaled for long contexts: Llama 3's and YaRN, read from a config.json.

A dimension pair turns by its frequency (radians a position). Both kinds leave fast pairs as they are and slow ones
`factor` times as far; they differ in between. tests/unit/test_families.py compares with transformers' numbers.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch

from megatron_egrsd.errors import BadArgument


def frequencies(theta: float, head_dim: int) -> torch.Tensor:
    """Return the frequencies fp32 [head_dim / 2] of a rotary embedding that is not scaled."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's: pairs are fast or slow by how often they turn in the context of the pretraining."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    attention_factor = 1.0  # of queries and keys alike

    def scaled(self, theta: float, head_dim: int) -> torch.Tensor:
        """Return the scaled frequencies fp32 [head_dim / 2]."""
        given = frequencies(theta, head_dim)
        wavelength = 2 * math.pi / given
        turns = self.original_max_position_embeddings / wavelength
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - kept) * given / self.factor + kept * given
        slow, fast = turns < self.low_freq_factor, turns > self.high_freq_factor
        return torch.where(slow, given / self.factor, torch.where(fast, given, between))

    @property
    def megatron_args(self) -> dict:
        """The arguments of Megatron-LM. Raises BadArgument for other bounds than its own, those of Llama 3.1 to 3.3."""
        bounds = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        if bounds != (1, 4, 8192):
            raise BadArgument(
                "the model's llama3 rope has low_freq_factor, high_freq_factor and original_max_position_embeddings "
                f"{', '.join(f'{bound:g}' for bound in bounds)}; Megatron-LM's arguments can say 1, 4, 8192 alone"
            )
        return {"use_rope_scaling": True, "rope_scaling_factor": self.factor}


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): the bounds are dimensions; longer contexts get sharper attention."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @property
    def attention_factor(self) -> float:
        """The factor of queries and keys alike."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def scaled(self, theta: float, head_dim: int) -> torch.Tensor:
        """Return the scaled frequencies fp32 [head_dim / 2]."""

        def dimension(turns: float) -> float:
            """Return the place of the pair that turns `turns` times in the context of the pretraining."""
            radians = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return head_dim * math.log(radians) / (2 * math.log(theta))

        first = max(math.floor(dimension(self.beta_fast)), 0)
        last = min(math.ceil(dimension(self.beta_slow)), head_dim - 1)
        width = last - first or 0.001
        slow = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
        given = frequencies(theta, head_dim)
        return given / self.factor * slow + given * (1 - slow)

    @property
    def megatron_args(self) -> dict:
        """The arguments of Megatron-LM."""
        return {
            "position_embedding_type": "yarn",
            "rotary_scaling_factor": self.factor,
            "yarn_original_max_position_embeddings": self.original_max_position_embeddings,
            "yarn_beta_fast": self.beta_fast,
            "yarn_beta_slow": self.beta_slow,
        }


RopeScaling = Llama3Scaling | YarnScaling
_TYPES = {"llama3": Llama3Scaling, "yarn": YarnScaling}
_ELSEWHERE = ("rope_type", "type", "rope_theta")  # keys that do not belong to the scaling


def read_rope(config: dict, source: str, default_theta: float) -> tuple[float, RopeScaling | None]:
    """Return theta and the scaling, None if there is none. Raises BadArgument, naming `source`, for another rope."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5 or 4
    theta = float(rope.get("rope_theta", config.get("rope_theta", default_theta)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in _TYPES:
        raise BadArgument(f"{source} asks for rope type {kind!r}; only default, {' and '.join(_TYPES)} are supported")
    fields = {field.name: field for field in dataclasses.fields(_TYPES[kind])}
    values = {key: value for key, value in rope.items() if key not in _ELSEWHERE and value is not None}
    if unknown := [key for key in values if key not in fields]:
        raise BadArgument(f"{source} sets {unknown[0]} for its {kind} rope, which is not supported")
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise BadArgument(f"{source} asks for a {kind} rope without {missing[0]}")
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise BadArgument(f"{source} sets {key} of its {kind} rope to {value!r}; it must be a positive number")
    scaling = _TYPES[kind](**values)
    if isinstance(scaling, Llama3Scaling) and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise BadArgument(f"{source} has a llama3 rope whose low_freq_factor is not below its high_freq_factor")
    return theta, scaling
