"""Forward and backward passes over packed micro-batches, through megatron-core's pipeline schedule."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_egrsd.config import ParallelConfig
from megatron_egrsd.data.packing import MicroBatch, Sequence, pack, schedule
from megatron_egrsd.engine.context_parallel import gather_columns, packed_seq_params
from megatron_egrsd.engine.heads import Head, ScoringHead
from megatron_egrsd.engine.routing import ReplayedRouting


class Passes:
    """The passes of one model over micro-batches of this rank's samples.

    Args:
        model: This rank's chunks of layers.
        parallel: How the ranks split the model and a micro-batch, and its token budget.
        vocab_size: Entries of the vocabulary, padding excluded.
        temperature: Divides the logits that are scored.
        device: Where the micro-batches are moved.
    """

    def __init__(
        self,
        model: list[DistributedDataParallel],
        parallel: ParallelConfig,
        *,
        vocab_size: int,
        temperature: float,
        device: torch.device,
    ):
        self.model, self.parallel, self.device = model, parallel, device
        self.context_group = parallel_state.get_context_parallel_group()
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.routing = ReplayedRouting(model, parallel.sequence_parallel)
        self.scoring = ScoringHead(tensor_group if tensor_group.size() > 1 else None, vocab_size, temperature)

    def micro_batches(self, sequences: Seq[Sequence], partition: list[list[int]]) -> list[MicroBatch]:
        """Pack this rank's part of `partition`, which holds the samples of every data-parallel rank."""
        parallel, rank = self.parallel, parallel_state.get_data_parallel_rank()
        lengths = [[parallel.tokens_on_a_rank(len(sequences[i])) for i in part] for part in partition]
        plan = schedule(lengths, parallel.max_tokens_per_microbatch, parallel.round_of_micro_batches)
        own = partition[rank]
        return [self._pack(sequences, [own[i] for i in part]) for part in plan[rank]]

    def owned(self, sequences: Seq[Sequence], partition: list[list[int]]) -> dict[int, torch.Tensor]:
        """Return the response tokens that this context-parallel rank holds, by sample of this data-parallel rank."""
        return {i: self._pack(sequences, [i]).own for i in partition[parallel_state.get_data_parallel_rank()]}

    def _pack(self, sequences: Seq[Sequence], members: list[int]) -> MicroBatch:
        parallel = self.parallel
        batch = pack(sequences, members, parallel.token_multiple, each=parallel.sequence_multiple)
        return batch.split(self.context_group.rank(), parallel.context)

    def run(self, batches: list[MicroBatch], loss: Callable, *, forward_only: bool, head: Head | None = None) -> list:
        """Run all micro-batches. Return, on the last stage, `loss` of the head's output of each.

        `head` is by default `scoring`: log-prob and entropy [2, R].
        """
        return get_forward_backward_func()(
            forward_step_func=functools.partial(self._forward, loss=loss, head=head or self.scoring),
            data_iterator=[iter(batches) for _ in self.model],
            model=self.model,
            num_microbatches=len(batches),
            seq_length=1,  # the stages exchange the true lengths (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Reduce no gradients meanwhile."""
        with contextlib.ExitStack() as stack:
            for chunk in self.model:
                stack.enter_context(chunk.no_sync())
            yield

    def _forward(self, batches: Iterator[MicroBatch], model, loss, head: Head):
        batch = next(batches).to(self.device)
        self.routing.begin(model, batch.routes)
        output = model(
            batch.tokens[None],
            batch.position_ids[None],
            None,
            packed_seq_params=packed_seq_params(batch, self.context_group),
            output_processor=self._response_rows,
            output_processor_context=(batch, head),
        )
        return output, functools.partial(loss, batch=batch)

    def _response_rows(self, *, hidden_states, output_layer, output_weight, context, **_) -> torch.Tensor:
        """Return the head's results [k, R] from the rows that predict response tokens: megatron-core's output hook."""
        batch, head = context
        if self.parallel.sequence_parallel:
            # The head returns the whole gradient of the gathered rows on every rank; each keeps its part.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        rows = hidden_states[:, 0].index_select(0, batch.rows)
        results = head(rows, output_layer.weight if output_weight is None else output_weight, batch)
        return gather_columns(results, batch, self.context_group)
