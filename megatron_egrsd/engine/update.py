"""What one optimizer step reports: sums over the response tokens that it trained, and whether it was applied."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenSums:
    """Sums over response tokens; those of micro-batches, ranks and updates add up with `+`."""

    loss: float = 0.0  # already divided by its normalizer
    tokens: float = 0.0  # the number of tokens
    values: dict[str, float] = field(default_factory=dict)  # by the name of the metric that is their mean

    def __add__(self, other: "TokenSums") -> "TokenSums":
        names = dict.fromkeys([*self.values, *other.values])
        values = {name: self.values.get(name, 0.0) + other.values.get(name, 0.0) for name in names}
        return TokenSums(self.loss + other.loss, self.tokens + other.tokens, values)


@dataclass(frozen=True)
class Update:
    """An optimizer step, equal on every rank. If it was skipped, the weights are as before."""

    sums: TokenSums
    skipped: str = ""  # the reason: "gradient", or as the caller of `Engine.train_step` calls it
    grad_norm: float = 0.0
    lr: float = 0.0
    micro_batches: int = 0
