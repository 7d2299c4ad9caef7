"""A resumed run: what its checkpoint brings, and what has changed in the configuration since."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_egrsd.config import Config
from megatron_egrsd.data.problems import Place
from megatron_egrsd.engine import checkpoint
from megatron_egrsd.engine.distributed import on_first_rank
from megatron_egrsd.engine.engine import Engine
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives.signal import History


def load(engine: Engine, config: Config, path: Path) -> tuple[Place, History]:
    """Load the checkpoint at `path`, and print what has changed since. Collective.

    Returns:
        The place in the order of the problems, and the statistics of the rewards.

    Raises:
        BadArgument: The checkpoint does not belong to this model or optimizer.
    """
    run_facts = on_first_rank(lambda: checkpoint.read_run_facts(path))
    check_frozen(path, run_facts, config)
    step, history = checkpoint.load(engine, path)
    if engine.is_first_rank:
        changes = changed_settings(run_facts.get("config", {}), asdict(config))
        print(f"continuing from {path}" + (f", changed: {'; '.join(changes)}" if changes else ""), flush=True)
        if not history:
            print("warning: it holds no statistics of the rewards; the running advantage warms up anew", flush=True)
    problems = run_facts.get("problems", step * config.rollout.prompts_per_step)  # 0.1.0 saved no notes
    return Place(step, problems), History(**history)


def check_frozen(path: Path, run_facts: dict[str, Any], config: Config) -> None:
    """Raise BadArgument if the checkpoint with `run_facts` has no moments of routers that are now to be trained."""
    frozen = run_facts.get("config", {}).get("optimizer", {}).get("freeze_router", False)
    if frozen and not config.optimizer.freeze_router:
        raise BadArgument(
            f"{path} is of a run with optimizer.freeze_router and holds no moments of the routers; continue with the "
            "same"
        )


def run_facts_after(step: int, config: Config, begin: Place) -> dict[str, Any]:
    """Return what a checkpoint of `step` notes of a run that began at `begin`."""
    return {"config": asdict(config), "problems": begin.after(step, config.rollout.prompts_per_step)}


def changed_settings(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Return "key old -> new" for every key that is in both configurations with another value.

    Where a run is written and what it resumes from are no settings of the training.
    """
    changes = []
    for key in sorted(before.keys() & now.keys()):
        name, old, new = prefix + key, before[key], now[key]
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_settings(old, new, f"{name}.")
        elif old != new and name != "output" and not name.startswith("checkpoint."):
            changes.append(f"{name} {old} -> {new}")
    return changes
