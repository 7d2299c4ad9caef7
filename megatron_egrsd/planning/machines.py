"""The machines that a plan is made for, by the constants of a GPU and its network. Imports nothing."""

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
        """bytes/s out of a GPU to others among as many neighbouring ranks."""
        return self.link if ranks <= self.node else self.network


# Peaks: NVIDIA's data sheets of the SXM modules (dense bf16; NVLink 900 GB/s in both directions together; one 400 Gb/s
# port a GPU as in DGX; 16 lanes of PCIe 5). Shares reached: assumed, docs/measurements/scaling.md says from what.
GEMM, HBM, WIRE = 0.5, 0.8, 0.8
MACHINES = {
    name: Machine(
        name, memory << 30, 989e12 * GEMM, hbm * HBM, 450e9 * WIRE, 50e9 * WIRE, 63e9 * WIRE, decode_seconds=0.7e-3
    )
    for name, memory, hbm in (("H100", 79, 3.35e12), ("H200", 140, 4.8e12))
}
