"""Divide the GPUs of a cluster and estimate the time of a step: the tables of docs/measurements/scaling.md.

    megatron-egrsd plan                                   # every table, H100 and H200
    megatron-egrsd plan --models Qwen3-8B --gpus 8 --machine H200 --rollouts 512 --lora-rank 64

Every layout that fits into memory is timed; the fastest is shown. `train --dry-run` plans one run of yours.
"""

import argparse

from megatron_egrsd.errors import BadArgument
from megatron_egrsd.planning.machines import MACHINES
from megatron_egrsd.system.arguments import Parser

ROLLOUTS = {8: 256, 64: 1024, 512: 4096}  # a step's, by GPUs: the batch grows more slowly than the cluster


def main(arguments: list[str]) -> None:
    """Print the tables that the `arguments` behind `megatron-egrsd plan` ask for. Raises BadArgument."""
    parser = Parser(prog="megatron-egrsd plan", description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["Qwen3-8B", "Qwen3-32B", "Qwen3-30B-A3B"], help="or directories"
    )
    parser.add_argument("--gpus", nargs="+", type=_gpus, default=list(ROLLOUTS), metavar="N")
    parser.add_argument("--machine", choices=list(MACHINES), help="default: each")
    parser.add_argument("--rollouts", type=_positive, help=f"a step's; default by GPUs: {ROLLOUTS}")
    parser.add_argument("--longest", type=_positive, default=16384, help="tokens at which a response is cut")
    parser.add_argument("--lora-rank", type=int, default=0, help="rank of the adapters to train; default: all weights")
    options = parser.parse_args(arguments)
    if options.lora_rank < 0:
        raise BadArgument(f"--lora-rank is {options.lora_rank}; it must not be negative")
    from megatron_egrsd.planning.cluster import table

    rollouts = {gpus: options.rollouts or ROLLOUTS.get(gpus, 256) for gpus in options.gpus}
    for machine in [MACHINES[options.machine]] if options.machine else MACHINES.values():
        print(f"\n{machine.name}\n")
        for line in table(machine, options.models, rollouts, options.longest, options.lora_rank):
            print(line, flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _gpus(text: str) -> int:
    if not text.isdecimal() or int(text) not in range(8, 4097, 8):
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 8 from 8 to 4096")
    return int(text)
