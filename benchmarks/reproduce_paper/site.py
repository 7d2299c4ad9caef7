"""Place the cells of one reproduction, and give the two commands that make a cell."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reproduce_paper.cells import MODELS, Cell
from benchmarks.runs import ROOT
from megatron_egrsd.config import Config
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.errors import BadArgument

LAUNCHER = ROOT / "examples/run_qwen3_8b_cl_egrsd.sh"  # of every model: it reads layout and sizes from CONFIG


@dataclass(frozen=True)
class Command:
    """Words of a process, and the environment variables that it gets besides."""

    words: list[str]
    variables: dict[str, str]


@dataclass(frozen=True)
class Site:
    """Directories, files and GPUs.

    Args:
        output: Directory of the reproduction; every node that takes part sees it.
        models: Hugging Face directories by the models of cells.MODELS.
        data: The training set.
        benchmarks: Directory of the six sets' files.
        configs: Configurations that replace those of cells.MODELS.
        gpus: GPUs of this node; 0 trains and samples in one process on the CPU.
        train, evaluate: Further words of every training, and of every evaluation; they win over all others.
    """

    output: Path
    models: dict[str, Path]
    data: Path
    benchmarks: Path
    configs: dict[str, str]
    gpus: int = 8
    train: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise BadArgument if a file that the cells read is missing."""
        for name, model in self.models.items():
            if not (model / "config.json").is_file():
                raise BadArgument(f"there is no Hugging Face checkpoint of {name} in {model} (no config.json)")
        if not self.data.is_file():
            raise BadArgument(f"there is no training file {self.data}; megatron-egrsd prepare-data makes one")
        if not self.benchmarks.is_dir():
            raise BadArgument(f"{self.benchmarks} is no directory with the files of the six sets (aime24.jsonl, ...)")

    def config_file(self, model: str) -> str:
        return self.configs.get(model, str(ROOT / MODELS[model].config))

    def config(self, cell: Cell) -> Config:
        """Return the configuration that the cell trains with; of an untrained cell, that of its model."""
        words = ["--config", self.config_file(cell.setting.model), "--data.train", "-"]
        return parse_config([*words, *cell.setting.options, *self.train])

    def directory(self, cell: Cell) -> Path:
        return self.output / "cells" / cell.key

    def run_of(self, cell: Cell) -> Path:
        return self.directory(cell) / "train"

    def evaluation_of(self, cell: Cell) -> Path:
        return self.directory(cell) / "evaluation"

    def export_of(self, cell: Cell) -> Path | None:
        """Return the finished run's adapter, or its model if all weights are trained; None if it is not finished."""
        paths = (self.run_of(cell) / name for name in ("adapter", "hf"))
        return next((path for path in paths if path.is_dir()), None)

    def is_trained(self, cell: Cell) -> bool:
        return not cell.setting.trains or self.export_of(cell) is not None

    def is_finished(self, cell: Cell) -> bool:
        return self.is_trained(cell) and (self.evaluation_of(cell) / "results.json").is_file()

    def identity(self, cell: Cell) -> dict[str, object]:
        """Return what decides the cell's numbers besides files; a cell is not continued with anything else."""
        return {"options": list(cell.setting.options), "train": list(self.train), "evaluate": list(self.evaluate)}

    def training(self, cell: Cell) -> Command:
        """Return the command that trains the cell, or continues its training."""
        model, output = cell.setting.model, self.run_of(cell)
        # With adapters the run exports them alone: the merged model is as large as the base model.
        words = [*cell.setting.options, "--lora.export", "adapter", *self.train]
        if not self.gpus:
            return Command(
                [*_PROGRAM, "train", "--config", self.config_file(model), "--model.path", str(self.models[model]),
                 "--data.train", str(self.data), "--data.evaluation", "", "--output", str(output),
                 "--seed", str(cell.seed), "--checkpoint.resume", "auto", *words], {})  # fmt: skip
        variables = {
            "MODEL": self.models[model], "CONFIG": self.config_file(model), "DATA": self.data, "EVAL_DATA": "",
            "OUTPUT": output, "SEED": cell.seed, "RESUME": "auto", "GPUS_PER_NODE": self.gpus,
            "NNODES": 1, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1",  # whatever a scheduler of several nodes has set
            "LORA_RANK": "",  # the configuration's, or that of `train`, which the cell's record names
        }  # fmt: skip
        return Command(["bash", str(LAUNCHER), *words], {name: str(value) for name, value in variables.items()})

    def evaluation(self, cell: Cell) -> Command:
        """Return the command that evaluates the cell by the paper's protocol, or continues that."""
        config = self.config_file(cell.setting.model)
        words = ["evaluate", "--config", config, "--evaluation.protocol", "egrsd_paper",
                 "--evaluation.benchmarks.directory", str(self.benchmarks), *self._model_words(cell),
                 "--seed", str(cell.seed), "--output", str(self.evaluation_of(cell))]  # fmt: skip
        if self.gpus:
            tensor = parse_config(["--config", config, "--data.train", "-"]).rollout.servers.tensor_parallel
            words += ["--rollout.servers.engines", str(max(1, self.gpus // tensor))]
        return Command([*_PROGRAM, *words, *self.evaluate], {})

    def _model_words(self, cell: Cell) -> list[str]:
        base, export = self.models[cell.setting.model], self.export_of(cell)
        if not cell.setting.trains:
            return ["--model.path", str(base)]
        if export.name == "hf":
            return ["--model.path", str(export)]
        return ["--model.path", str(base), "--lora.init", str(export)]

    def failure_of(self, cell: Cell) -> str:
        """Return the reason for which the cell's last attempt failed, or ""."""
        try:
            return json.loads((self.directory(cell) / "failure.json").read_text())["reason"]
        except (OSError, ValueError, KeyError):
            return ""


_PROGRAM = [sys.executable, "-m", "megatron_egrsd.cli"]
