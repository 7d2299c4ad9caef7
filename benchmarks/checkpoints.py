"""Checkpoints saved at once and in the background, in turn: seconds that training stands still, and seconds in all.

    python -m benchmarks.checkpoints [--layers 28] [--rounds 5] [--steps 4] [--tokens 64] [--directory DIR]

One CPU rank trains in fp32 with Qwen3-0.6B's sizes but for its layers, and random weights. A trial saves a checkpoint
in DIR and takes --steps steps; the one in the background is published between two of them, or waited for at the end.
Host memory holds 16 bytes a parameter for training, and 12 for the copy.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.adapters import config_of, made_up_rollouts
from benchmarks.convert import make_model
from benchmarks.measure import in_turn, load, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of a response")
    parser.add_argument("--directory", default=tempfile.gettempdir())
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from megatron_egrsd.engine import checkpoint
    from megatron_egrsd.engine.build import build_engine
    from megatron_egrsd.learn import learn

    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        model = Path(scratch, "model")
        make_model(model, trainable=True, num_hidden_layers=arguments.layers)
        config, rollouts = config_of(model, rank=0), made_up_rollouts(arguments.tokens)
        stalls: dict[bool, list[float]] = {False: [], True: []}
        with build_engine(config, needs_teacher=False) as engine:
            learn(engine, rollouts, config)  # makes Adam's moments
            saved = 0

            def trial(background: bool) -> None:
                nonlocal saved
                saved += 1
                started = time.perf_counter()
                saving = checkpoint.save(engine, Path(scratch, "checkpoints"), saved, 1, {}, background=background)
                stalled, published = time.perf_counter() - started, not background
                for step in range(1, arguments.steps + 1):
                    learn(engine, rollouts, config)
                    started = time.perf_counter()
                    if not published and (step == arguments.steps or saving.written()):
                        saving.publish()
                        published = True
                    stalled += time.perf_counter() - started
                stalls[background].append(stalled)

            kinds = {"at once": False, "in the background": True}
            functions = {name: lambda background=background: trial(background) for name, background in kinds.items()}
            functions |= {"no checkpoint": lambda: [learn(engine, rollouts, config) for _ in range(arguments.steps)]}
            seconds = in_turn(functions, arguments.rounds)
            size = sum(file.stat().st_size for file in Path(scratch, "checkpoints").rglob("*.distcp"))
    print(f"\n{arguments.layers} layers, {size / 1e9:.2f} GB a checkpoint, {arguments.rounds} rounds; {load()}\n")
    rows = []
    for name, found in seconds.items():
        stalled = stalls[kinds[name]] if name in kinds else [0.0]
        rows.append([name, *(f"{f(x):.1f}" for x in (stalled, found) for f in (median, min, max))])
    print(
        table(["checkpoint", "stalled: median", "min", "max", f"{arguments.steps} steps: median", "min", "max"], rows)
    )


if __name__ == "__main__":
    main()
