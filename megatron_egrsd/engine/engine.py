"""The training engine: one Qwen3 in any TP x PP x CP x DP layout that can score tokens and take optimizer steps.

Every rank makes the same calls with the same arguments; the engine knows which part is its own.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module

from megatron_egrsd.config import Config
from megatron_egrsd.data.packing import MicroBatch, Sequence, balance_passes, pack, schedule
from megatron_egrsd.engine import distributed
from megatron_egrsd.engine.context_parallel import gather_scores, packed_seq_params
from megatron_egrsd.engine.model import build_model, transformer_config
from megatron_egrsd.engine.offload import Shelf, without
from megatron_egrsd.engine.optimizer import build_optimizer, parts
from megatron_egrsd.engine.update import TokenSums, Update
from megatron_egrsd.engine.weights import export_hf, load_hf
from megatron_egrsd.hf.checkpoint import HFCheckpoint
from megatron_egrsd.objectives.load import needs_teacher
from megatron_egrsd.vocab_parallel import linear_log_prob_and_entropy

# (log_prob [R], entropy [R], micro-batch) -> (loss to differentiate, TokenSums.values as detached scalars)
LossFunction = Callable[[torch.Tensor, torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]

# A micro-batch's (loss, response tokens, sums), still on the device
_Output = tuple[torch.Tensor | float, int, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Scores:
    """log pi(y_t) and the entropy of the full next-token distribution, both fp32 [response length], in nats."""

    log_prob: torch.Tensor
    entropy: torch.Tensor


class Engine:
    """Owns the process groups, the model, its optimizer and the teacher's weights. Close it, or use it with `with`."""

    def __init__(self, config: Config, facts: distributed.Facts | None = None):
        """`facts`, which all ranks must have in common (agreement.py), are compared before anything is built."""
        self.config = config
        checkpoint = HFCheckpoint(config.model.path)
        self.arch = checkpoint.architecture
        self.arch.check_parallel(config.parallel)
        self.device = distributed.initialize(config.parallel, config.seed, facts)
        self.data_parallel = config.check_world(dist.get_world_size())
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_group = parallel_state.get_data_parallel_group()
        self.context_group = parallel_state.get_context_parallel_group()
        self.is_first_rank = dist.get_rank() == 0

        dtype = getattr(torch, config.model.dtype)
        transformer = transformer_config(self.arch, config.parallel, dtype)
        self.chunks = [chunk.to(self.device) for chunk in build_model(self.arch, transformer, config.parallel)]
        load_hf(self.chunks, checkpoint)
        reduction = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        )
        self.model = [
            DistributedDataParallel(
                transformer, reduction, Float16Module(transformer, chunk) if dtype == torch.bfloat16 else chunk
            )
            for chunk in self.chunks
        ]
        updates = config.steps * config.optimizer.updates_per_batch
        self.optimizer, self.scheduler = build_optimizer(
            self.model, config.optimizer, updates, dtype, config.parallel.distributed_optimizer
        )
        transformer.no_sync_func = self._no_sync
        # The losses are normalised before they reach the schedule, so it must not divide by its own token count.
        transformer.finalize_model_grads_func = lambda model, *_, **__: finalize_model_grads(model, None)
        transformer.grad_scale_func = self.optimizer.scale_loss

        self.teacher_weights = None
        if config.teacher.weights != "live" and needs_teacher(config.objective):
            # The moving average is kept in fp32: in bf16 a step of (1 - decay) would round away.
            kept = torch.float32 if config.teacher.weights == "ema" else dtype
            self.teacher_weights = [p.detach().to(kept, copy=True) for p in self.parameters()]
        self.reference_weights = None
        if config.objective.kl_coef:
            frozen = self.teacher_weights if config.teacher.weights == "frozen" else None
            self.reference_weights = frozen or [p.detach().clone() for p in self.parameters()]
        self._weights = Shelf(self.parameters)
        self._gradients = Shelf(self.gradients, contents=False)
        self._state = Shelf(self._training_state)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()
        if reason := distributed.lost_contact(error):
            raise reason from error

    def close(self) -> None:
        distributed.shutdown()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """This rank's, of all its chunks."""
        return itertools.chain.from_iterable(chunk.parameters() for chunk in self.chunks)

    def gradients(self) -> Iterator[torch.Tensor]:
        """The buffers of this rank's gradients, of all its chunks."""
        return (b.grad_data for chunk in self.model for b in chunk.buffers + chunk.expert_parallel_buffers)

    def _training_state(self) -> list[torch.Tensor]:
        """What the optimizer holds beside the weights, and the weights of teacher and reference that are their own."""
        optimizers = [part.optimizer for part in parts(self.optimizer)]
        main = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        moments = [t for o in optimizers for state in o.state.values() for t in state.values()]
        tensors = [t for t in (*main, *moments) if isinstance(t, torch.Tensor) and t.device == self.device]
        return [*without(tensors, self.parameters()), *(self.teacher_weights or []), *(self.reference_weights or [])]

    # -- turns on the device ------------------------------------------------------------------------------------

    def offload(self, *, keep_weights: bool = False) -> None:
        """Hand the device's memory back: weights (unless kept), optimizer and teacher wait in host memory.

        Nothing but `reload`, and with the weights kept `export_weights`, may be called until it is there again.
        """
        self._gradients.put()
        self._state.put()
        if not keep_weights:
            self._weights.put()

    def reload(self, *, only_weights: bool = False) -> None:
        """Take what `offload` put away back to the device, bit for bit."""
        self._weights.take()
        if not only_weights:
            self._state.take()
            self._gradients.take()

    # -- what is whose ------------------------------------------------------------------------------------------

    def partition(self, scored: Seq[int], trained: Seq[int] | None = None) -> list[list[int]]:
        """Samples of each data-parallel rank, balanced by the tokens of the scoring and of the training pass.

        `trained` is 0 for a sample that is only scored; None where there is one pass over all.
        """
        return balance_passes(scored, scored if trained is None else trained, self.data_parallel)

    def _micro_batches(self, sequences: Seq[Sequence], partition: list[list[int]]) -> list[MicroBatch]:
        parallel = self.config.parallel
        lengths = [[parallel.tokens_on_a_rank(len(sequences[i])) for i in part] for part in partition]
        plan = schedule(lengths, parallel.max_tokens_per_microbatch, parallel.round_of_micro_batches)
        own, each = partition[self.data_parallel_rank], parallel.sequence_multiple
        parts = plan[self.data_parallel_rank]
        batches = (pack(sequences, [own[i] for i in part], parallel.token_multiple, each=each) for part in parts)
        return [batch.split(self.context_group.rank(), parallel.context) for batch in batches]

    # -- forward and backward -----------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self,
        sequences: Seq[Sequence],
        partition: list[list[int]],
        weights: Literal["current", "teacher", "reference"] = "current",
    ) -> dict[int, Scores]:
        """Scores of this data-parallel rank's samples, by index into `sequences`, on every rank of the replica.

        `weights`: the current ones, the teacher's (config.teacher), or the initial ones (config.objective.kl_coef).
        """
        batches = self._micro_batches(sequences, partition)
        for chunk in self.model:
            chunk.eval()
        other = {"current": None, "teacher": self.teacher_weights, "reference": self.reference_weights}[weights]
        with self._holding(other):
            outputs = self._run(batches, lambda output, batch, **_: output, forward_only=True)
        packed = torch.empty(2, sum(b.targets.numel() for b in batches), device=self.device)
        if outputs:
            packed = torch.cat(outputs, 1)
        if self.config.parallel.pipeline > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(packed, last, group=parallel_state.get_pipeline_model_parallel_group())
        scores = {}
        for batch, part in zip(batches, packed.split([b.targets.numel() for b in batches], 1), strict=True):
            log_probs, entropies = batch.unpack(part[0]), batch.unpack(part[1])
            scores |= {i: Scores(log_probs[i], entropies[i]) for i in batch.samples}
        return scores

    def train_step(
        self,
        sequences: Seq[Sequence],
        partition: list[list[int]],
        loss: LossFunction,
        reason_to_skip: Callable[[TokenSums], str] = lambda sums: "",
    ) -> Update:
        """One optimizer step on all `sequences`; `loss` sees this rank's micro-batches on the last pipeline stage.

        It sees whole responses, on every context-parallel rank; each differentiates the scores of its own tokens.
        The losses of all micro-batches and ranks are summed, never averaged: the caller divides by the global batch's
        normaliser. The step is skipped if the gradient is not finite or if `reason_to_skip` of the sums is not "".
        """
        batches = self._micro_batches(sequences, partition)
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._run(batches, functools.partial(_differentiate, loss), forward_only=False)
        sums = self._sum_over_ranks(outputs)
        if reason := reason_to_skip(sums) or ("" if self._gradient_is_finite() else "gradient"):
            return Update(sums, skipped=reason)
        lr = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        if self.teacher_weights is not None and self.config.teacher.weights == "ema":
            rate = 1 - self._ema_decay()
            for teacher, student in zip(self.teacher_weights, self.parameters(), strict=True):
                teacher.lerp_(student.detach().float(), rate)
        return Update(sums, grad_norm=float(grad_norm), lr=lr, micro_batches=len(batches))

    def _gradient_is_finite(self) -> bool:
        """Whether every rank's part of the reduced gradient is; megatron-core itself only looks in fp16."""
        total = sum(gradient.sum(dtype=torch.float32) for gradient in self.gradients())
        bad = (~torch.isfinite(total)).int()
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return not bad.item()

    def _ema_decay(self) -> float:
        """Decay per optimizer step that gives config.teacher.ema_decay per rollout batch."""
        return self.config.teacher.ema_decay ** (1 / self.config.optimizer.updates_per_batch)

    def _run(self, batches: list[MicroBatch], loss, *, forward_only: bool) -> list:
        """megatron-core's schedule over the micro-batches; what `loss` returns for each, on the last stage."""
        return get_forward_backward_func()(
            forward_step_func=functools.partial(self._forward, loss=loss),
            data_iterator=[iter(batches) for _ in self.model],
            model=self.model,
            num_microbatches=len(batches),
            seq_length=1,  # the stages exchange the true lengths (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    @contextlib.contextmanager
    def _no_sync(self) -> Iterator[None]:
        """No chunk reduces its gradients."""
        with contextlib.ExitStack() as stack:
            for chunk in self.model:
                stack.enter_context(chunk.no_sync())
            yield

    def _forward(self, batches: Iterator[MicroBatch], model, loss):
        batch = next(batches).to(self.device)
        output = model(
            batch.tokens[None],
            batch.position_ids[None],
            None,
            packed_seq_params=packed_seq_params(batch, self.context_group),
            output_processor=self._response_scores,
            output_processor_context=batch,
        )
        return output, functools.partial(loss, batch=batch)

    def _response_scores(self, *, hidden_states, output_layer, output_weight, context: MicroBatch, **_) -> torch.Tensor:
        """megatron-core's output hook: log-prob and entropy [2, R] from the rows that predict response tokens alone."""
        if self.config.parallel.sequence_parallel:
            # The head below returns the whole gradient of the gathered rows on every rank; each keeps its part.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        group = parallel_state.get_tensor_model_parallel_group()
        log_prob, entropy = linear_log_prob_and_entropy(
            hidden_states[:, 0].index_select(0, context.rows),
            output_layer.weight if output_weight is None else output_weight,
            context.targets.index_select(0, context.own),
            group=group if group.size() > 1 else None,
            vocab_size=self.arch.vocab_size,
            temperature=self.config.rollout.temperature,
        )
        return gather_scores(torch.stack([log_prob, entropy]), context, self.context_group)

    # -- sums, teacher, weights ---------------------------------------------------------------------------------

    def _sum_over_ranks(self, outputs: "list[_Output]") -> TokenSums:
        """Sum over micro-batches and data-parallel ranks; the same result everywhere."""
        own = TokenSums()
        if parallel_state.get_tensor_model_parallel_rank() == 0 and self.context_group.rank() == 0:
            for loss, tokens, values in outputs:
                own += TokenSums(float(loss), float(tokens), {name: float(value) for name, value in values.items()})
        gathered = [own]
        if dist.get_world_size() > 1:
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, own)
        return sum(gathered, TokenSums())

    @contextlib.contextmanager
    def _holding(self, weights: list[torch.Tensor] | None):
        """The model with these weights (None: its own), exchanged by pointer; only a type that differs is copied."""
        if weights is None:
            yield
            return
        parameters = list(self.parameters())
        current = [p.data for p in parameters]
        for p, other in zip(parameters, weights, strict=True):
            p.data = other.to(p.dtype)
        try:
            yield
        finally:
            for p, data in zip(parameters, current, strict=True):
                p.data = data

    def export_weights(self, placeholders: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor) on the first rank; every rank must exhaust it.

        Others get nothing or, with `placeholders`, the same names with tensors on the meta device.
        """
        return ((name, t) for name, t in export_hf(self.chunks, self.arch) if placeholders or not t.is_meta)


def _differentiate(
    loss: LossFunction, output: torch.Tensor, batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor, _Output]:
    """The loss of a micro-batch, its tokens as megatron-core counts them, and what is left of it after the step."""
    tokens = batch.targets.numel()
    if not batch.samples:  # padding alone: no loss, but this rank's backward pass runs like the others'
        return output.sum(), torch.tensor(0, dtype=torch.int), (0.0, 0, {})
    value, sums = loss(output[0], output[1], batch)
    return value, torch.tensor(tokens, dtype=torch.int), (value.detach(), tokens, sums)
