"""The members of the objective's family, by name, with one run's settings."""

from dataclasses import replace

from megatron_egrsd.config import ObjectiveConfig

NAMES = {"grpo": "GRPO", "rlsd": "RLSD", "egrsd": "EGRSD", "cl_egrsd": "CL-EGRSD", "run": "this run"}


def family(objective: ObjectiveConfig) -> dict[str, ObjectiveConfig]:
    """The four members with the settings of `objective`; what it has switched off takes its default value."""
    default = ObjectiveConfig()
    full = replace(
        objective,
        function="",
        options={},
        mix=objective.mix or default.mix,
        attenuation=objective.attenuation or default.attenuation,
        lookahead=objective.lookahead or default.lookahead,
    )
    return {
        "grpo": replace(full, mix=0.0, attenuation=0.0, lookahead=0),
        "rlsd": replace(full, attenuation=0.0, lookahead=0),
        "egrsd": replace(full, lookahead=0),
        "cl_egrsd": full,
    }


def member(objective: ObjectiveConfig) -> str:
    """Return the member that `objective` is; "run" for a mixture without a name and for a user's own."""
    if not objective.attenuation:
        objective = replace(objective, lookahead=0)  # without a gate it makes no difference
    return next((name for name, other in family(objective).items() if other == objective), "run")


def title(objective: ObjectiveConfig) -> str:
    """Return the objective's name: a member's name, or that of a user's own class."""
    return objective.function.rpartition(":")[2] or NAMES[member(objective)]


def settings(objective: ObjectiveConfig) -> str:
    """λ 0.5, ε 0.2, α 0.9, K 2: mix, ratio_clip, attenuation, lookahead; of a user's own: its file and options."""
    o = objective
    if o.function:
        return ", ".join([o.function.rpartition(":")[0], *(f"{name} {value}" for name, value in o.options.items())])
    return f"λ {o.mix:g}, ε {o.ratio_clip:g}, α {o.attenuation:g}, K {o.lookahead}"
