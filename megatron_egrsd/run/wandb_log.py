"""The metrics of a run in Weights & Biases, under the names of metrics.jsonl; a resumed run continues its curve."""

import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megatron_egrsd.config import Config
from megatron_egrsd.errors import RunError
from megatron_egrsd.system.files import write_text

_ID = "wandb/run_id"  # in the output directory: the same for every start of a run


class WandbLog:
    """One start of a run in Weights & Biases. Raises RunError if the run cannot be opened there.

    Later failures of the service do not end the run: `say` tells the first one, and the rest is left to metrics.jsonl.
    wandb raises them as OSError, RuntimeError, its own Error, and types of its own that have no base in common.
    """

    def __init__(self, config: Config, say: Callable[[str], None]):
        import wandb

        self.output, self.say = Path(config.output), say
        settings = config.logging.wandb
        try:
            self.run = wandb.init(
                project=settings.project,
                name=settings.name or self.output.resolve().name,
                id=_run_id(self.output),
                resume="allow",
                mode=settings.mode,
                dir=str(self.output),
                config=asdict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
            # The steps since the last checkpoint come again after a resume; wandb's own counter would refuse them.
            self.run.define_metric("*", step_metric="step")
        except Exception as error:
            raise RunError(f"Weights & Biases cannot open the run (logging.wandb): {error}") from None
        offline = f"offline; upload with: wandb sync {self.output}/wandb/offline-run-*"
        say(f"wandb {self.run.url if settings.mode == 'online' else offline}")

    def record(self, step: int, numbers: dict[str, float | int]) -> None:
        """Add one row of metrics.jsonl."""
        if self.run is None:
            return
        try:
            self.run.log({"step": step} | numbers)
        except Exception as error:
            self.run = None
            self.say(f"Weights & Biases takes no more metrics: {error}; metrics.jsonl has them all")

    def close(self) -> None:
        """Upload what is left. Raises nothing: the run has ended, whatever its service does."""
        if self.run is None:
            return
        try:
            self.run.finish()
        except Exception as error:
            self.say(f"Weights & Biases did not take the last metrics: {error}; metrics.jsonl has them all")


def _run_id(output: Path) -> str:
    """Return the id that an earlier start of the run has kept in `output`, or keep a new one there."""
    path = output / _ID
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()
