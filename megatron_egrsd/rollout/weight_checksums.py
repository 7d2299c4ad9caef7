"""The checksums that SGLang's /weights_checker must return for given HF weights.

SGLang stores models differently from HF: q, k and v in one tensor, gate and up in one, all experts of a layer in two,
the vocabulary padded with rows of zeros to a multiple of 64, and one shard per tensor-parallel rank. This module brings
HF tensors into that layout.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator

import torch

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_FUSED_NAME = {part: fused for fused, parts in _FUSED.items() for part in parts}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_STACKED = {"w13_weight": ("gate_proj", "up_proj"), "w2_weight": ("down_proj",)}
_ROW_PARALLEL = re.compile(r"\.(o_proj|down_proj)\.weight$")
_VOCABULARY = re.compile(r"(embed_tokens|lm_head)\.weight$")
_VOCABULARY_MULTIPLE = 64  # SGLang's VocabParallelEmbedding pads to a multiple of this

TensorRank = tuple[int, int]  # tensor-parallel rank and size


def expected_checksums(
    named_tensors: Iterable[tuple[str, torch.Tensor]], shards: list[TensorRank]
) -> Iterator[tuple[str, list[str], dict[TensorRank, str]]]:
    """Yield (SGLang's name, the HF names in it, {shard: checksum}) from a stream of HF tensors.

    The tensors may come in any order, but the experts of a layer must be adjacent. The checksums are exact for
    tensor-parallel sizes up to the number of key heads (beyond it SGLang repeats key heads), and if an expert's
    intermediate size on a rank is a multiple of 64 (on CPUs SGLang pads it to one).
    """
    waiting: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    layer, experts = "", {}
    for name, tensor in named_tensors:
        if found := _EXPERT.fullmatch(name):
            if found[1] != layer:
                yield from _stacked_experts(layer, experts, shards)
                layer, experts = found[1], {}
            experts.setdefault(int(found[2]), {})[found[3]] = (name, tensor)
            continue
        *head, module, kind = name.split(".")
        fused = _FUSED_NAME.get(module)
        if fused is None:
            yield name, [name], {shard: checksum(_shard(name, tensor, *shard)) for shard in shards}
            continue
        fused_name = ".".join([*head, fused, kind])
        parts = waiting.setdefault(fused_name, {})
        parts[module] = (name, tensor)
        if len(parts) == len(_FUSED[fused]):
            ordered = [parts[part] for part in _FUSED[fused]]
            del waiting[fused_name]
            yield fused_name, [n for n, _ in ordered], {
                (rank, size): checksum(torch.cat([t.chunk(size)[rank] for _, t in ordered]))
                for rank, size in shards
            }  # fmt: skip
    yield from _stacked_experts(layer, experts, shards)
    for fused_name, parts in waiting.items():
        yield fused_name, [n for n, _ in parts.values()], dict.fromkeys(shards, "incomplete")


def _stacked_experts(
    layer: str, experts: dict[int, dict[str, tuple[str, torch.Tensor]]], shards: list[TensorRank]
) -> Iterator[tuple[str, list[str], dict[TensorRank, str]]]:
    """Yield checksums: gate and up [experts, 2 x intermediate, hidden], down [experts, hidden, intermediate]."""
    for name, parts in _STACKED.items() if experts else ():
        members = [[experts[e][part] for part in parts if part in experts[e]] for e in sorted(experts)]
        sums = dict.fromkeys(shards, "incomplete")
        if all(len(m) == len(parts) for m in members):
            for rank, size in shards:
                own = [[t.chunk(size, dim=int(name == "w2_weight"))[rank] for _, t in m] for m in members]
                sums[rank, size] = checksum(torch.stack([torch.cat(tensors) for tensors in own]))
        yield f"{layer}.{name}", [n for m in members for n, _ in m], sums


def checksum(tensor: torch.Tensor) -> str:
    """Return SGLang's `tensor_hash` of a tensor's bytes as SGLang prints it: 16 hexadecimal digits."""
    if tensor.is_cuda:
        from sglang.srt.managers.mm_utils import tensor_hash  # its Triton hash; bytes never leave the GPU

        return f"{tensor_hash(tensor.detach()):016x}"
    return tensor_sha256(tensor)[:16]


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in hexadecimal, as SGLang computes it of an adapter that it was sent."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(data)).hexdigest()


def _shard(name: str, tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    if _VOCABULARY.search(name):
        padding = -len(tensor) % _VOCABULARY_MULTIPLE
        return torch.nn.functional.pad(tensor, (0, 0, 0, padding)).chunk(size)[rank]
    if _ROW_PARALLEL.search(name):
        return tensor.chunk(size, dim=1)[rank]
    return tensor
