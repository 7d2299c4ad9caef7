"""Compare on-policy, one step off and partial rollouts: time of a step, and learning (docs/measurements/overlap.md).

    python -m benchmarks.overlap time OUTPUT [--repeats 3] [--steps 12] [-- --section.key value ...]
    python -m benchmarks.overlap curves OUTPUT [--seeds 0 1 2] [--steps 30] [-- --section.key value ...]

Both run the demo's configuration, the three modes in turn; runs that are in OUTPUT already are read, not repeated.
`time` also measures how much sampling and training in processes of their own slow each other down here, which
its prediction needs: virtual cores may be threads of one.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median

import numpy as np

from benchmarks.measure import load, table
from benchmarks.runs import CONFIG, TRAIN, metrics, run
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.planning.preflight import prepare
from megatron_egrsd.planning.step_time import step_seconds
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.servers import RolloutServers

ONE_STEP_OFF = ["--rollout.staleness", "1", "--objective.importance_cap", "2"]
PARTIAL = [*ONE_STEP_OFF, "--rollout.staleness", "2", "--rollout.partial", "true", "--rollout.extra_prompts", "8"]
MODES = {"on-policy": [], "one step off": ONE_STEP_OFF, "partial rollouts": PARTIAL}
PHASES = ("generate", "score", "train", "sync", "wait", "step")


def train(output: Path, arguments: list[str]) -> list[dict]:
    """Return the rows of metrics.jsonl of a run. Exits with the run's message if it fails."""
    if not (output / "hf").exists():
        run([*TRAIN, "--output", str(output.resolve()), *arguments], 1, str(output))
    return metrics(output)


def slowdown(more: list[str], rounds: int = 5) -> tuple[float, float]:
    """Measure how many times as long sampling, and passes of the model in another process, take together as alone."""
    config = parse_config([*CONFIG, "--output", "unused", *more])
    prompts, _, tokenizer = prepare(config)
    ids = [prompt.student_ids for prompt in prompts[: config.rollout.prompts_per_step]]
    context = multiprocessing.get_context("spawn")
    passes, other = context.Pipe()
    worker = context.Process(target=_passes, args=(other, config.model.path), daemon=True)
    worker.start()
    sampling: dict[bool, list[float]] = {False: [], True: []}  # seconds a token, alone and beside the passes
    passing: dict[bool, list[float]] = {False: [], True: []}  # passes a second, alone and beside the sampling
    with (
        tempfile.TemporaryDirectory() as logs,
        RolloutServers(config.rollout.servers, config.model, config.seed, Path(logs)) as servers,
    ):
        client = RolloutClient(servers, config.rollout, [tokenizer.eos_token_id])
        client.generate(ids, config.rollout.rollouts_per_prompt)  # warms up
        for _ in range(rounds):
            for beside in (False, True):
                if beside:
                    passes.send("start")
                for _ in range(2):
                    start = time.perf_counter()
                    groups = client.generate(ids, config.rollout.rollouts_per_prompt)
                    seconds = time.perf_counter() - start
                    sampling[beside].append(seconds / sum(len(r.response_ids) for group in groups for r in group))
                if not beside:
                    passes.send("start")
                    time.sleep(2)
                passes.send("stop")
                passing[beside].append(passes.recv())
    passes.close()
    worker.join(20)
    return median(sampling[True]) / median(sampling[False]), median(passing[False]) / median(passing[True])


def _passes(requests: Connection, checkpoint: str) -> None:
    """Run forward and backward passes on one thread from "start" to "stop"; answers with how many a second."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = torch.randint(model.config.vocab_size, (32, 128))  # as many as a micro-batch of the demo

    def one() -> None:
        model(tokens).logits.logsumexp(-1).mean().backward()

    one()
    while True:
        try:
            requests.recv()
        except EOFError:
            return
        count, start = 0, time.perf_counter()
        while not requests.poll():
            one()
            count += 1
        seconds = time.perf_counter() - start
        requests.recv()
        requests.send(count / seconds)


def time_table(output: Path, repeats: int, steps: int, more: list[str]) -> None:
    """Print medians over the steps of all repeats, without the first, which warms up, and the last, which is alone."""
    before = slowdown(more)
    phases: dict[str, list[dict[str, np.ndarray]]] = {mode: [] for mode in MODES}
    overlapped: dict[str, list[list[np.ndarray]]] = {mode: [] for mode in MODES}
    for repeat in range(repeats):
        for mode, arguments in MODES.items():
            path = output / f"{mode.replace(' ', '-')}-{repeat}"
            common = ["--data.evaluation", "", "--steps", str(steps), "--seed", str(repeat)]
            rows = [row for row in train(path, [*common, *arguments, *more]) if "time/step" in row]
            seconds = {phase: np.array([row[f"time/{phase}"] for row in rows]) for phase in PHASES}
            seconds["tokens"] = np.array([row["batch/tokens"] for row in rows])
            phases[mode].append({name: values[1:-1] for name, values in seconds.items()})
            ahead = [seconds["generate"][2:], *(seconds[phase][1:-1] for phase in ("score", "train", "sync"))]
            overlapped[mode].append(ahead)  # one step off, a step trains while the next one's batch is sampled
            print(f"{mode} {repeat}: median step {median(phases[mode][-1]['step']):.2f} s; {load()}",
                  file=sys.stderr, flush=True)  # fmt: skip
    medians = {
        mode: {name: median(np.concatenate([run[name] for run in runs])) for name in (*PHASES, "tokens")}
        for mode, runs in phases.items()
    }
    rows = ([mode, *(f"{m[phase]:.2f} s" for phase in PHASES), f"{m['tokens']:,.0f}"] for mode, m in medians.items())
    print(table([f"median of {repeats} x {steps - 2} steps", *PHASES, "tokens a batch"], rows))
    whole = {mode: found["step"] for mode, found in medians.items()}
    factors = [fmean(pair) for pair in zip(before, slowdown(more), strict=True)]
    beside = "sampling {:.2f} times as long, training {:.2f} times".format(*factors)
    forecasts = [
        ("on-policy's phases, processors of their own", "on-policy", (1.0, 1.0)),
        (f"on-policy's phases, {beside}", "on-policy", factors),
        ("its own phases", "one step off", (1.0, 1.0)),
    ]
    for name, mode, slower in forecasts:
        seconds = median(np.concatenate([step_seconds(*a, staleness=1, slowdown=slower) for a in overlapped[mode]]))
        saved = 1 - seconds / whole["on-policy"]
        print(f"one step off, predicted from {name}: {seconds:.2f} s, {saved:.0%} less than on-policy")
    print("less than on-policy", end="")
    for mode in list(MODES)[1:]:
        runs = zip(phases["on-policy"], phases[mode], strict=True)
        each = ", ".join(f"{1 - median(b['step']) / median(a['step']):.0%}" for a, b in runs)
        print(f"; {mode} {1 - whole[mode] / whole['on-policy']:.0%} (by repeat: {each})", end="")
    print()


def curves(output: Path, seeds: list[int], steps: int, more: list[str]) -> None:
    """Print held-out accuracy and length at every evaluation: mean over the seeds, lowest and highest in brackets."""
    columns: dict[str, dict[int, list[dict]]] = {}
    for seed in seeds:
        for mode, arguments in MODES.items():
            path = output / f"{mode.replace(' ', '-')}-seed-{seed}"
            rows = train(path, ["--steps", str(steps), "--seed", str(seed), *arguments, *more])
            for row in rows:
                if "evaluation/accuracy" in row:
                    columns.setdefault(mode, {}).setdefault(row["step"], []).append(row)
            print(f"{mode} {seed}: {rows[-1].get('evaluation/accuracy')}", file=sys.stderr, flush=True)
    at = sorted(next(iter(columns.values())))
    rows = []
    for name, key, form in (("accuracy", "accuracy", "{:.1%}"), ("length", "length/mean", "{:.1f}")):
        for mode, by_step in columns.items():
            values = [[row[f"evaluation/{key}"] for row in by_step[step]] for step in at]
            cells = [f"{form.format(fmean(v))} ({form.format(min(v))} to {form.format(max(v))})" for v in values]
            rows.append([f"{name}, {mode}", *cells])
    print(table([f"{len(seeds)} seeds, after step", *at], rows, "---"))


def main() -> None:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    own, more = words[:end], words[end + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "curves"])
    parser.add_argument("output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: 12 for time, 30 for curves")
    options = parser.parse_args(own)
    if options.what == "time":
        time_table(options.output, options.repeats, options.steps or 12, more)
    else:
        curves(options.output, options.seeds, options.steps or 30, more)


if __name__ == "__main__":
    main()
