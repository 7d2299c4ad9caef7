"""GRPO end to end against TRL's GRPOTrainer on this CPU (docs/measurements/end_to_end.md).

    python -m benchmarks.end_to_end OUTPUT --trl-python VENV/bin/python [--models tiny 20m] [--repeats 3]

Same checkpoint, prompts, order, reward, batch, group size and length limit; fp32; one update a batch. TRL lives in an
environment of its own, with this project's requirements and trl. The systems take turns; a run that is in OUTPUT
already is read, not repeated.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.measure import load, table
from benchmarks.runs import CONFIG, ROOT, TRAIN, metrics, run

TINY = ROOT / "examples/tiny/model"
PHASES = ("generate", "prepare", "train", "sync", "wait", "step")


@dataclass(frozen=True)
class Case:
    """A batch, and micro-batches of about the same memory: TRL's in samples, ours in tokens."""

    prompts: int
    per_prompt: int
    longest: int
    steps: int
    microbatch: int
    tokens: int
    lr: float
    reward: str


CASES = {
    "tiny": Case(16, 8, 240, 10, 32, 4096, 3e-4, "math"),
    "20m": Case(4, 8, 480, 5, 8, 2048, 1e-6, f"{Path(__file__).resolve()}:even_length"),
}
SYSTEMS = {  # threads of the trainer, and our settings; our server has one, beside a trainer that waits or one of one
    "TRL": (2, None),
    "TRL, one thread": (1, None),
    "ours": (2, {}),
    "ours, one step off": (1, {"rollout.staleness": 1, "objective.importance_cap": 2}),
}


def even_length(response: str, answer: str) -> float:
    """Return a reward that a random model earns every other time."""
    return float(len(response) % 2 == 0)


def model(name: str, output: Path) -> Path:
    """Return the path of the tiny model, or of a random one of 20M parameters over its tokenizer.

    Its tokens are about equally likely, which makes the lengths geometric: mean 45, one in a hundred above 200.
    """
    path = output / "model-20m"
    if name == "tiny" or path.exists():
        return TINY if name == "tiny" else path
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=384, intermediate_size=1280, num_hidden_layers=10, num_attention_heads=6, num_key_value_heads=2,
        head_dim=64, vocab_size=45, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    network = Qwen3ForCausalLM(config).float()
    shutil.copytree(TINY, path, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    network.save_pretrained(path)
    print(f"20m: {sum(p.numel() for p in network.parameters()):,} parameters", file=sys.stderr)
    return path


def settings(case: Case, checkpoint: Path, output: Path) -> dict:
    """Return our settings, by dotted key."""
    return {
        "model.path": checkpoint, "data.train": ROOT / "examples/tiny/train.jsonl", "data.evaluation": "",
        "data.reward": case.reward, "objective.preset": "grpo", "optimizer.clip_grad": 1.0,
        "rollout.prompts_per_step": case.prompts, "rollout.rollouts_per_prompt": case.per_prompt,
        "rollout.max_response_tokens": case.longest, "rollout.sync.verify": "false",
        "parallel.max_tokens_per_microbatch": case.tokens, "optimizer.lr": case.lr, "steps": case.steps,
        "output": output,
    }  # fmt: skip


def words(values: dict) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def order(case: Case, checkpoint: Path) -> list[dict]:
    """Return the prompts in the order in which our run takes them, as text and as tokens."""
    from megatron_egrsd.config_reader import parse_config
    from megatron_egrsd.data.problems import batch_indices
    from megatron_egrsd.data.prompt_builder import prompt_builder
    from megatron_egrsd.data.prompts import load_prompts

    config = parse_config([*CONFIG, *words(settings(case, checkpoint, Path("unused")))])
    builder = prompt_builder(config)
    prompts = load_prompts(config.data.train, builder, privileged=False)
    chosen = [prompts[i] for s in range(case.steps) for i in batch_indices(len(prompts), case.prompts, s, config.seed)]
    return [
        {"text": builder.tokenizer.decode(p.student_ids), "ids": p.student_ids, "answer": p.problem.answer}
        for p in chosen
    ]


def measure(system: str, path: Path, case: Case, checkpoint: Path, trl_python: str) -> list[dict]:
    """Return the steps of a run, which runs if it has not, as rows of metrics.jsonl."""
    threads, own = SYSTEMS[system]
    if not (path / "finished").exists():
        shutil.rmtree(path, ignore_errors=True)
        if own is None:
            path.mkdir(parents=True)
            facts = vars(case) | {"model": str(checkpoint), "order": order(case, checkpoint)}
            (path / "case.json").write_text(json.dumps(facts), encoding="utf-8")
            command = [trl_python, "-m", "benchmarks.trl_grpo", str(path)]
        else:
            command = [*TRAIN, *words(settings(case, checkpoint, path) | own)]
        run(command, threads, system)
        (path / "finished").touch()
    return [row for row in metrics(path) if "time/step" in row]


def print_table(name: str, runs: dict[str, list[list[dict]]], case: Case) -> None:
    """Print medians over the steps of all repeats, without each run's first step, which warms up, and last."""
    print(f"\n**{name}**: {case.prompts} prompts x {case.per_prompt}, at most {case.longest} tokens\n")
    steps = {system: [row for run in found for row in run[1:-1]] for system, found in runs.items()}
    a_token = {s: median(row["time/step"] / row["batch/tokens"] for row in found) for s, found in steps.items()}
    rows = []
    for system, found in steps.items():
        seconds = ([row[f"time/{phase}"] for row in found if f"time/{phase}" in row] for phase in PHASES)
        cells = [f"{median(values):.2f} s" if values else "" for values in seconds]
        tokens = median(row["batch/tokens"] for row in found)
        cells += [f"{tokens:,.0f}", f"{a_token[system] * 1e3:.3f}", f"{a_token[system] / a_token['ours']:.2f}"]
        rows.append([system, SYSTEMS[system][0], *cells])
    print(table(["", "threads", *PHASES, "tokens a step", "ms a token", "times ours"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--trl-python", required=True, help="Python of an environment that has trl")
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    output = options.output.resolve()
    for name in options.models:
        case, runs = CASES[name], {system: [] for system in options.systems}
        checkpoint = model(name, output)
        for repeat in range(options.repeats):
            for system in options.systems:
                path = output / f"{name}-{system.replace(', ', '-').replace(' ', '-')}-{repeat}"
                runs[system].append(measure(system, path, case, checkpoint, options.trl_python))
                print(f"{path.name}: median step {median(r['time/step'] for r in runs[system][-1][1:-1]):.2f} s; "
                      f"{load()}", file=sys.stderr, flush=True)  # fmt: skip
        print_table(name, runs, case)


if __name__ == "__main__":
    main()
