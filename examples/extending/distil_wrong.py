"""Right responses reinforce themselves; wrong ones learn the teacher's whole distribution at every token.

megatron-egrsd train --config examples/configs/tiny_cpu.yaml \
    --objective.function examples/extending/distil_wrong.py:DistilWrong
"""

from dataclasses import dataclass

from megatron_egrsd.objectives import DivergenceForm, Objective


@dataclass(frozen=True)
class DistilWrong(Objective):
    """L = -sum over A > 0 of A log pi(y_t) / N + strength * sum over A < 0 of JSD(pi_T, pi)_t / N.

    Args:
        strength: Weight of the divergence.
    """

    strength: float = 1.0

    divergence = DivergenceForm("jsd", beta=0.5)  # of the teacher in the mixture

    def weight(self, tokens):
        return tokens.advantage.clamp(min=0)

    def divergence_weight(self, tokens):
        return self.strength * (tokens.advantage < 0)

    def metrics(self, tokens):
        return {"wrong/divergence": self.divergence_weight(tokens) * tokens.divergence}
