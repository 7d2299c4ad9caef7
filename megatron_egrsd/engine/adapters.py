"""Adapters (LoRA) beside megatron-core's linear layers: what they add to an output, and to a weight.

The tensors are PEFT's, one A and B for each Hugging Face projection (hf/adapters.py). Tensor parallelism splits them as
it splits the layer: of a column-parallel one B over its rows, of a row-parallel one A over its columns; the other is
replicated. The ranks exchange the rows between A and B, which are only as wide as the adapter's rank.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig

from megatron_egrsd.hf.adapters import LINEAR, ROW_PARALLEL, AdapterSpec, adapter_entries, merged
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.mapping import Entry, hf_shapes

# {linear layer: its projections, in the order of its rows}
_FUSED = {layer: [p for p, linear in LINEAR.items() if linear == layer] for layer in LINEAR.values()}


class LowRank(torch.nn.Module):
    """A [r, in] and B [out, r] of one projection, or this rank's shards of them."""

    def __init__(self, a: torch.nn.Parameter, b: torch.nn.Parameter):
        super().__init__()
        self.lora_A, self.lora_B = a, b


class LinearAdapter(torch.nn.Module):
    """The adapters of the projections that one linear layer fuses; its children are a LowRank for each.

    Args:
        projections: Their A and B, in the order of the layer's rows; a projection may lack them.
        rows: {projection: its rows in this rank's shard of the layer}, in the layer's order.
        groups: Groups of rows in the shard; each holds its part of every projection in turn.
        scale: Factor of B A x.
        is_row_parallel: True if the ranks split the layer over its input.
        sequence_parallel: True if they split the tokens outside of it.
    """

    def __init__(
        self,
        projections: dict[str, LowRank],
        *,
        rows: dict[str, int],
        groups: int,
        scale: float,
        is_row_parallel: bool,
        sequence_parallel: bool,
    ):
        super().__init__()
        for name, pair in projections.items():
            self.add_module(name, pair)
        self.rows, self.groups, self.scale = rows, groups, scale
        self.is_row_parallel, self.sequence_parallel = is_row_parallel, sequence_parallel
        self.enabled = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the adapters add to the layer's output for its input x [T, 1, in]."""
        pairs: dict[str, LowRank] = dict(self.named_children())
        narrow = self._exchange(F.linear(x, torch.cat([pair.lora_A for pair in pairs.values()]))) * self.scale
        inputs = dict(zip(pairs, narrow.chunk(len(pairs), -1), strict=True))
        outputs = [
            F.linear(inputs[name], pairs[name].lora_B) if name in pairs else narrow.new_zeros(*narrow.shape[:-1], rows)
            for name, rows in self.rows.items()
        ]
        return self._fuse(outputs)

    def _exchange(self, narrow: torch.Tensor) -> torch.Tensor:
        """Bring A x to the ranks as the layer brings its input or output to them, with the fitting gradient."""
        if self.is_row_parallel and self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(narrow)
        if self.is_row_parallel:
            return reduce_from_tensor_model_parallel_region(narrow)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(narrow)
        return copy_to_tensor_model_parallel_region(narrow)

    def _fuse(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join `parts`, [..., rows] of every projection, to [..., rows of all] in the order of the layer's rows."""
        return torch.cat([part.unflatten(-1, (self.groups, -1)) for part in parts], -1).flatten(-2)

    @torch.no_grad()
    def merge(self, weight: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard [rows, in] of the layer's weight with the adapters added in."""
        widths = [rows // self.groups for rows in self.rows.values()]
        shards = [part.flatten(0, 1) for part in weight.unflatten(0, (self.groups, -1)).split(widths, 1)]
        pairs: dict[str, LowRank] = dict(self.named_children())
        parts = [
            merged(shard, pairs[name].lora_A, pairs[name].lora_B, self.scale) if name in pairs else shard
            for name, shard in zip(self.rows, shards, strict=True)
        ]
        return self._fuse([part.mT for part in parts]).mT


def attach_adapters(
    chunks: list[torch.nn.Module],
    arch: Architecture,
    config: TransformerConfig,
    spec: AdapterSpec,
    tensor: Callable[[str], torch.Tensor],
) -> None:
    """Freeze the weights and add trainable adapters; `tensor` returns the full tensor of a PEFT name."""
    table = {entry.megatron: entry for entry in adapter_entries(arch, spec)}
    rows = {name.split(".")[-2]: shape[0] for name, shape in hf_shapes(arch).items()}  # of a whole projection
    for chunk in chunks:
        chunk.requires_grad_(False)
        if chunk.pre_process and config.recompute_granularity:
            # Layers that are recomputed get gradients only if their input has one.
            chunk.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        for layer in chunk.decoder.layers:
            for path, projections in _FUSED.items():
                if targets := [name for name in projections if name in spec.targets]:
                    linear = layer.get_submodule(path)
                    place = f"decoder.layers.{layer.layer_number - 1}.{path}.adapter"
                    pairs = {
                        name: LowRank(
                            _parameter(table[f"{place}.{name}.lora_A"], tensor, linear.weight, config),
                            _parameter(table[f"{place}.{name}.lora_B"], tensor, linear.weight, config),
                        )
                        for name in targets
                    }
                    linear.adapter = _linear_adapter(pairs, {p: rows[p] for p in projections}, arch, config, spec)
                    linear.register_forward_hook(_add_adapter)


def _parameter(
    entry: Entry, tensor: Callable[[str], torch.Tensor], like: torch.Tensor, config: TransformerConfig
) -> torch.nn.Parameter:
    """Return this rank's shard of an A or B, marked for megatron-core's reduction and norm of gradients."""
    group = parallel_state.get_tensor_model_parallel_group()
    shard = entry.layout.shard(tensor(entry.hf[0]), group.rank(), group.size())
    parameter = torch.nn.Parameter(shard.to(like.device, like.dtype, copy=True).contiguous())
    if entry.layout.dim is None:
        # Between A and B the ranks hold other tokens, so that the gradients of a replicated one are summed.
        parameter.sequence_parallel = config.sequence_parallel
    else:
        set_tensor_model_parallel_attributes(parameter, True, entry.layout.dim, 1)
    return parameter


def _linear_adapter(
    pairs: dict[str, LowRank],
    rows: dict[str, int],
    arch: Architecture,
    config: TransformerConfig,
    spec: AdapterSpec,
) -> LinearAdapter:
    """Return the adapter of the linear layer that fuses the projections with `rows`."""
    is_row_parallel = next(iter(rows)) in ROW_PARALLEL
    ranks = 1 if is_row_parallel else parallel_state.get_tensor_model_parallel_world_size()
    return LinearAdapter(
        pairs,
        rows={name: number // ranks for name, number in rows.items()},
        groups=arch.num_kv_heads // ranks if "q_proj" in rows else 1,
        scale=spec.scale,
        is_row_parallel=is_row_parallel,
        sequence_parallel=config.sequence_parallel,
    )


def _add_adapter(linear: torch.nn.Module, inputs: tuple, outputs: tuple) -> tuple | None:
    """Add the adapter's output to y: forward hook of a linear layer, whose outputs are (y, bias)."""
    if not linear.adapter.enabled:
        return None
    output, bias = outputs
    return output + linear.adapter(inputs[0]), bias


@contextlib.contextmanager
def adapters_off(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Run the model with its frozen weights alone."""
    adapters = [m for chunk in chunks for m in chunk.modules() if isinstance(m, LinearAdapter)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True
