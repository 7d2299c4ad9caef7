"""The machines that a plan is made for, by the constants of a GPU and its network."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A GPU (or CPU) and its network. Rates are peaks times the share that is assumed to be reached.

    flops           FLOP/s of matrix products
    memory_rate     bytes/s from HBM while decoding
    link, network   bytes/s out of a GPU to others of its node, and to other nodes
    host            bytes/s between a GPU and pinned host memory
    decode_seconds  a decoding step's fixed cost
    pass_seconds    a micro-batch's fixed cost, forward or backward
    tensor_seconds  fixed cost of gathering and sending one tensor in a weight sync
    bucket_seconds  fixed cost of one bucket: a request to every server
    """

    name: str
    memory: int
    flops: float
    memory_rate: float
    link: float
    network: float
    host: float
    decode_seconds: float = 2e-3
    pass_seconds: float = 5e-3
    tensor_seconds: float = 2e-4
    bucket_seconds: float = 10e-3
    node: int = 8

    def rate(self, ranks: int) -> float:
        """Return the bytes/s out of a GPU to others among as many neighbouring ranks."""
        return self.link if ranks <= self.node else self.network


# Dense bf16 FLOP/s by words of the name that torch gives a device, the longer before those that they contain: NVIDIA's
# data sheets, whose figures with sparsity are halved.
PEAKS = {
    "GB200": 2500e12, "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
}  # fmt: skip

# Other peaks: NVIDIA's data sheets of the SXM modules (NVLink 900 GB/s in both directions together; one 400 Gb/s
# port a GPU as in DGX; 16 lanes of PCIe 5). Shares reached: assumed, docs/measurements/scaling.md says from what.
GEMM, HBM, WIRE = 0.5, 0.8, 0.8
MACHINES = {
    name: Machine(
        name, memory << 30, PEAKS[name] * GEMM, hbm * HBM, 450e9 * WIRE, 50e9 * WIRE, 63e9 * WIRE, decode_seconds=0.7e-3
    )
    for name, memory, hbm in (("H100", 79, 3.35e12), ("H200", 140, 4.8e12))
}


def peak_flops(device: str) -> float:
    """Return the dense bf16 FLOP/s of a device by the name that torch gives it; 0 if it is not known."""
    return PEAKS.get(_known(device), 0.0)


def machine_of(device: str) -> Machine | None:
    """Return the machine of devices of that name; None if it is not in MACHINES."""
    return MACHINES.get(_known(device))


def _known(device: str) -> str:
    """Return a device's name in PEAKS; "" if it has none, or is a slice of a device (MIG)."""
    if "MIG" in device:
        return ""
    return next((name for name in PEAKS if re.search(rf"\b{name}\b", device)), "")
