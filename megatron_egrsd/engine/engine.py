"""The training engine: one model in any TP x PP x CP x DP layout that can score tokens and take optimizer steps.

Every rank makes the same calls with the same arguments; the engine knows which part is its own. passes.py runs the
model over micro-batches, update.py sums their losses, offload.py moves the memory.
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
from megatron.core.distributed import finalize_model_grads

from megatron_egrsd.config import ModelConfig, OptimizerConfig, ParallelConfig, TeacherConfig
from megatron_egrsd.data.packing import Sequence, balance_passes
from megatron_egrsd.engine import distributed
from megatron_egrsd.engine.adapters import adapters_off, attach_adapters
from megatron_egrsd.engine.heads import DivergenceHead, Head, HoldingHead, TeacherStates
from megatron_egrsd.engine.model import build_model, data_parallel_model, transformer_config
from megatron_egrsd.engine.offload import OffloadedStorages, without
from megatron_egrsd.engine.optimizer import build_optimizer, parts
from megatron_egrsd.engine.passes import Passes
from megatron_egrsd.engine.routing import freeze_routers
from megatron_egrsd.engine.update import LossFunction, TokenSums, Update, differentiate, sum_over_ranks
from megatron_egrsd.engine.weights import export_adapter, export_hf, load_hf
from megatron_egrsd.hf.adapters import AdapterSpec, adapter_shapes, initial_tensor
from megatron_egrsd.hf.checkpoint import HFCheckpoint
from megatron_egrsd.vocab_parallel import DivergenceForm

Weights = Literal["current", "teacher", "reference"]


@dataclass(frozen=True)
class Scores:
    """log pi(y_t) and the entropy of the full next-token distribution, both fp32 [response length], in nats.

    And the divergence from a teacher, if the samples were scored against one. `further_log_probs` [K, response length]
    are the teacher's after its further contexts, NaN if a rollout has fewer than K; `learn` adds them.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    divergence: torch.Tensor | None = None
    further_log_probs: torch.Tensor | None = None


class Engine:
    """The process groups, the model, its optimizer and the teacher's weights. Close it, or use it with `with`."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        teacher: TeacherConfig,
        *,
        updates: int,
        rollouts_per_update: int,
        temperature: float,
        seed: int,
        needs_teacher: bool,
        needs_reference: bool,
        facts: distributed.Facts | None = None,
        adapter: AdapterSpec | None = None,
        initial_adapter: Callable[[str], torch.Tensor] | None = None,
    ):
        """Join the process groups, load the model and build its optimizer.

        Args:
            model: The Hugging Face checkpoint and the type of the weights.
            parallel: How the ranks split the model and the batch.
            optimizer: AdamW and its schedule.
            teacher: The weights that the teacher scores with.
            updates: Optimizer steps of the whole run, for the schedule.
            rollouts_per_update: Rollouts that the data-parallel ranks share in each update.
            temperature: Temperature of all scores.
            seed: Seed of torch's generators and of a new adapter.
            needs_teacher: Whether to score with the teacher's weights.
            needs_reference: Whether to score with the initial weights, for a KL penalty.
            facts: Values that all ranks must have in common (run/agreement.py), compared before anything is built.
            adapter: The adapter to train in place of the weights, which are then frozen; None trains the weights.
            initial_adapter: Returns the tensor of a PEFT name that the adapter begins with; None begins a new one.

        Raises:
            BadArgument: The layout does not divide the model, the ranks or the rollouts; the model cannot have the
                adapter; or the ranks' facts differ.
        """
        self.parallel, self.teacher, self.adapter, self.model_path = parallel, teacher, adapter, model.path
        self.updates_per_batch = optimizer.updates_per_batch
        checkpoint = HFCheckpoint(model.path)
        self.arch = checkpoint.architecture
        self.arch.check_parallel(parallel)
        if adapter:
            adapter.check(self.arch, parallel.tensor)
        self.device = distributed.initialize(parallel, seed, facts)
        self.data_parallel = parallel.check_world(dist.get_world_size(), rollouts_per_update)
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_group = parallel_state.get_data_parallel_group()
        self.is_first_rank = dist.get_rank() == 0

        dtype = getattr(torch, model.dtype)
        transformer = transformer_config(self.arch, parallel, dtype)
        self.chunks = [chunk.to(self.device) for chunk in build_model(self.arch, transformer, parallel, adapter)]
        load_hf(self.chunks, checkpoint)
        if adapter:
            shapes = adapter_shapes(self.arch, adapter)
            new = initial_adapter or (lambda name: initial_tensor(name, shapes[name], seed))
            attach_adapters(self.chunks, self.arch, transformer, adapter, new)
        if optimizer.freeze_router:
            freeze_routers(self.chunks)
        self.model = data_parallel_model(self.chunks, transformer, parallel)
        self.passes = Passes(
            self.model, parallel, vocab_size=self.arch.vocab_size, temperature=temperature, device=self.device
        )
        self.optimizer, self.scheduler = build_optimizer(
            self.model, optimizer, updates, dtype, parallel.distributed_optimizer
        )
        transformer.no_sync_func = self.passes.no_sync
        # The losses are normalised before they reach the schedule, so it must not divide by its own token count.
        transformer.finalize_model_grads_func = lambda model, *_, **__: finalize_model_grads(model, None)
        transformer.grad_scale_func = self.optimizer.scale_loss
        self.teacher_weights = self._copied_for_teacher(dtype) if needs_teacher else None
        self.reference_weights = self._copied_for_reference() if needs_reference else None
        self._weights = OffloadedStorages(self.parameters)
        self._gradients = OffloadedStorages(self.gradients, contents=False)
        self._state = OffloadedStorages(self._training_state)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()
        if reason := distributed.lost_contact(error):
            raise reason from error

    def close(self) -> None:
        distributed.shutdown()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters of all chunks of this rank."""
        return itertools.chain.from_iterable(chunk.parameters() for chunk in self.chunks)

    def trainable(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters that are trained: the adapter's, or all."""
        return (p for p in self.parameters() if p.requires_grad)

    def gradients(self) -> Iterator[torch.Tensor]:
        """Yield the gradient buffers of all chunks of this rank."""
        return (b.grad_data for chunk in self.model for b in chunk.buffers + chunk.expert_parallel_buffers)

    def _training_state(self) -> list[torch.Tensor]:
        """Return the optimizer's tensors besides the weights, and copies that teacher and reference hold."""
        optimizers = [part.optimizer for part in parts(self.optimizer)]
        main = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        moments = [t for o in optimizers for state in o.state.values() for t in state.values()]
        tensors = [t for t in (*main, *moments) if isinstance(t, torch.Tensor) and t.device == self.device]
        return [*without(tensors, self.parameters()), *(self.teacher_weights or []), *(self.reference_weights or [])]

    # -- memory of the device -----------------------------------------------------------------------------------

    def offload(self, *, keep_weights: bool = False) -> None:
        """Hand the device's memory back: weights (unless kept), optimizer and teacher wait in host memory.

        Nothing but `reload`, and with the weights kept `export_weights`, may be called until it is there again.
        """
        self._gradients.offload()
        self._state.offload()
        if not keep_weights:
            self._weights.offload()

    def reload(self, *, only_weights: bool = False) -> None:
        """Restore on the device what `offload` has moved, bit for bit."""
        self._weights.restore()
        if not only_weights:
            self._state.restore()
            self._gradients.restore()

    # -- data parallelism ---------------------------------------------------------------------------------------

    def partition(self, scored: Seq[int], trained: Seq[int] | None = None) -> list[list[int]]:
        """Divide samples among the data-parallel ranks, balanced by the tokens of the scoring and of the training pass.

        `trained` is 0 for a sample that is only scored; None if there is one pass over all.
        """
        return balance_passes(scored, scored if trained is None else trained, self.data_parallel)

    # -- forward and backward -----------------------------------------------------------------------------------

    def score(
        self,
        sequences: Seq[Sequence],
        partition: list[list[int]],
        weights: Weights = "current",
        teacher: TeacherStates | None = None,
    ) -> dict[int, Scores]:
        """Score this data-parallel rank's samples, by index into `sequences`; equal on every rank of the replica.

        `weights`: the current ones, the teacher's, or the initial ones (the reference of a KL penalty). With a
        `teacher` (`hold_teacher`) the divergence from it is scored too.
        """
        head = DivergenceHead(self.passes.scoring, teacher, log_prob_grad=False) if teacher else self.passes.scoring
        return self._score(sequences, partition, weights, head, rows=3 if teacher else 2)

    def hold_teacher(
        self,
        teachers: Seq[Sequence],
        students: Seq[Sequence],
        partition: list[list[int]],
        form: DivergenceForm,
    ) -> tuple[dict[int, Scores], TeacherStates]:
        """Score `teachers` with the teacher's weights, and keep its states for a divergence from it on `students`.

        Both lists have the same responses after other prompts. The states are those of the teacher now; they serve
        every pass over these samples until they are dropped.
        """
        states = TeacherStates(form)
        copied = self.updates_per_batch > 1 and self.teacher.weights in ("live", "ema") and not self.adapter
        owned = self.passes.owned(students, partition)
        head = HoldingHead(self.passes.scoring, states, owned, self.passes.context_group, copied)
        return self._score(teachers, partition, "teacher", head), states

    @torch.no_grad()
    def _score(
        self, sequences: Seq[Sequence], partition: list[list[int]], weights: Weights, head: Head, rows: int = 2
    ) -> dict[int, Scores]:
        batches = self.passes.micro_batches(sequences, partition)
        for chunk in self.model:
            chunk.eval()
        with self._scoring_with(weights):
            outputs = self.passes.run(batches, lambda output, batch, **_: output, forward_only=True, head=head)
        packed = torch.empty(rows, sum(b.targets.numel() for b in batches), device=self.device)
        if outputs:
            packed = torch.cat(outputs, 1)
        if self.parallel.pipeline > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(packed, last, group=parallel_state.get_pipeline_model_parallel_group())
        scores = {}
        for batch, part in zip(batches, packed.split([b.targets.numel() for b in batches], 1), strict=True):
            columns = [batch.unpack(row) for row in part]
            scores |= {i: Scores(*(column[i] for column in columns)) for i in batch.members}
        return scores

    def train_step(
        self,
        sequences: Seq[Sequence],
        partition: list[list[int]],
        loss: LossFunction,
        reason_to_skip: Callable[[TokenSums], str] = lambda sums: "",
        *,
        teacher: TeacherStates | None = None,
        log_prob_grad: bool = True,
    ) -> Update:
        """Take one optimizer step on all `sequences`; `loss` gets this rank's micro-batches on the last pipeline stage.

        It gets whole responses, on every context-parallel rank; each differentiates the scores of its own tokens. With
        a `teacher` (`hold_teacher`) it gets the divergence from it, too; the log-prob then needs no gradient.
        The losses of all micro-batches and ranks are summed, never averaged: the caller divides by the global batch's
        normaliser. The step is skipped if the gradient is not finite or if `reason_to_skip` of the sums is not "".
        """
        batches = self.passes.micro_batches(sequences, partition)
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        head = DivergenceHead(self.passes.scoring, teacher, log_prob_grad) if teacher else None
        outputs = self.passes.run(batches, functools.partial(differentiate, loss), forward_only=False, head=head)
        sums = sum_over_ranks(outputs)
        if reason := reason_to_skip(sums) or ("" if self._gradient_is_finite() else "gradient"):
            return Update(sums, skipped=reason)
        lr = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        if self.teacher_weights is not None and self.teacher.weights == "ema":
            rate = 1 - self.teacher.ema_decay ** (1 / self.updates_per_batch)  # over all updates of a batch: the decay
            for average, student in zip(self.teacher_weights, self.trainable(), strict=True):
                average.lerp_(student.detach().float(), rate)
        return Update(sums, grad_norm=float(grad_norm), lr=lr, micro_batches=len(batches))

    @torch.no_grad()
    def refresh_teacher(self, step: int) -> None:
        """Copy the current weights to the teacher if it is a snapshot that is due after `step` steps."""
        teacher = self.teacher
        if self.teacher_weights is not None and teacher.weights == "snapshot" and step % teacher.snapshot_every == 0:
            for copy, student in zip(self.teacher_weights, self.trainable(), strict=True):
                copy.copy_(student)

    def _gradient_is_finite(self) -> bool:
        """Return whether the reduced gradient is finite on every rank; megatron-core itself checks only in fp16."""
        total = sum(gradient.sum(dtype=torch.float32) for gradient in self.gradients())
        bad = (~torch.isfinite(total)).int()
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return not bad.item()

    # -- weights ------------------------------------------------------------------------------------------------

    def _copied_for_teacher(self, dtype: torch.dtype) -> list[torch.Tensor] | None:
        """Copy the trained weights if that is needed: without its adapter, a model has the initial ones."""
        weights = self.teacher.weights
        if weights == "live" or (self.adapter and weights == "frozen"):
            return None
        # The moving average is kept in fp32: in bf16 a step of (1 - decay) would round away.
        kept = torch.float32 if weights == "ema" else dtype
        return [p.detach().to(kept, copy=True) for p in self.trainable()]

    def _copied_for_reference(self) -> list[torch.Tensor] | None:
        """Copy the initial weights, as `_copied_for_teacher` does; a frozen teacher has them."""
        if self.adapter:
            return None
        frozen = self.teacher_weights if self.teacher.weights == "frozen" else None
        return frozen or [p.detach().clone() for p in self.trainable()]

    def _scoring_with(self, weights: Weights) -> contextlib.AbstractContextManager[None]:
        """Run the model with the weights of `score`."""
        if self.adapter and (weights == "reference" or (weights == "teacher" and self.teacher.weights == "frozen")):
            return adapters_off(self.chunks)
        others = {"current": None, "teacher": self.teacher_weights, "reference": self.reference_weights}[weights]
        return self._holding(others) if others else contextlib.nullcontext()

    @contextlib.contextmanager
    def _holding(self, weights: list[torch.Tensor]) -> Iterator[None]:
        """Run the model with these trained weights, exchanged by pointer; only another type is copied."""
        parameters = list(self.trainable())
        current = [p.data for p in parameters]
        for p, other in zip(parameters, weights, strict=True):
            p.data = other.to(p.dtype)
        try:
            yield
        finally:
            for p, data in zip(parameters, current, strict=True):
                p.data = data

    def export_weights(
        self, placeholders: bool = False, *, adapted_only: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, full tensor) on rank 0, adapters added in; every rank must exhaust the iterator.

        Other ranks get nothing or, with `placeholders`, the same names with tensors on the meta device. With
        `adapted_only` the weights without an adapter, which training does not change, are left out.
        """
        weights = export_hf(self.chunks, self.arch, adapted_only=adapted_only)
        return ((name, t) for name, t in weights if placeholders or not t.is_meta)

    def export_adapter(self, placeholders: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (PEFT name, full tensor) of the adapter, as `export_weights` does."""
        if not self.adapter:
            raise ValueError("this engine trains all weights: there is no adapter to export")
        tensors = export_adapter(self.chunks, self.arch, self.adapter)
        return ((name, t) for name, t in tensors if placeholders or not t.is_meta)
