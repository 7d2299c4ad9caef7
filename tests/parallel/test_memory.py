"""The dry run's memory against the engine: resident bytes exactly, a step's peak within a tenth, on every rank."""

import dataclasses
import itertools
import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_egrsd.config import LoraConfig, ModelConfig, ParallelConfig, TeacherConfig
from megatron_egrsd.config.lora import ATTENTION, TARGETS
from megatron_egrsd.data.samples import load_rollouts, save_rollouts
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.planning.activations import Placement
from megatron_egrsd.planning.fit import memory_of_stages
from megatron_egrsd.planning.plan import checkpoint_bytes
from tests.models import FAMILIES, make_model, make_qwen3
from tests.presets import preset_objective
from tests.ranks import run_ranks
from tests.training import GROUPS, held_tensors, made_up_rollouts, open_engine, storage_bytes, training_config

# Sizes in multiples of 64, so that the distributed optimizer pads nothing but the end of its buffer.
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000}


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of all live storages, given or made by operations, and of their peak."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref] = {}
        for tensor in known:
            self._see(tensor)
        self.start = self.now

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def gone(_):
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return out


def _measure(rank, world_size, config, path):
    """Return this rank's resident bytes by name, peak bytes that step 2 adds, stage, and tokens of micro-batches.

    These are the tokens of the longest one of training, and of all passes.
    """
    from megatron.core import parallel_state

    from megatron_egrsd.learn import learn

    rollouts = load_rollouts(path)
    with open_engine(config) as engine:
        learn(engine, rollouts, config)
        held = held_tensors(engine)
        lengths, micro_batches = [], engine.passes.micro_batches

        def note(*args):
            batches = micro_batches(*args)
            lengths.append(max(batch.tokens.numel() for batch in batches))
            return batches

        engine.passes.micro_batches = note
        with LiveBytes([*itertools.chain(*held.values())]) as live:
            learn(engine, rollouts, config)
        names = {"gradients": "gradients (fp32)"}  # as the dry run calls them
        resident = {names.get(part, part): storage_bytes(tensors) for part, tensors in held.items()}
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return resident, live.peak - live.start, stage, lengths[-1], max(lengths)


EXPERTS = {"num_experts": 4, "moe_intermediate_size": 192}
# name -> (ranks, dtype, parallel, tied embeddings, teacher)
LAYOUTS = {
    "fp32, KL": (1, "float32", {}, False, "live"),
    "fp32, KL from the frozen teacher": (1, "float32", {}, False, "frozen"),
    "bf16, moving average": (1, "bfloat16", {}, True, "ema"),
    "bf16, snapshot": (1, "bfloat16", {}, True, "snapshot"),
    "bf16, recompute": (1, "bfloat16", {"recompute": True}, False, "frozen"),
    "TP2": (2, "float32", {"tensor": 2}, True, "live"),
    "TP2 SP": (2, "bfloat16", {"tensor": 2, "sequence_parallel": True}, False, "live"),
    "TP2, one key/value head": (2, "float32", {"tensor": 2}, True, "live"),
    "PP2": (2, "bfloat16", {"pipeline": 2}, True, "frozen"),
    "PP2 VPP2": (2, "bfloat16", {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True}, True, "ema"),
    "DP2 distributed optimizer": (2, "bfloat16", {"distributed_optimizer": True}, False, "live"),
    "TP2 PP2": (4, "float32", {"tensor": 2, "pipeline": 2, "distributed_optimizer": True}, True, "live"),
    "CP2": (2, "float32", {"context": 2}, False, "live"),
    "CP2 distributed optimizer": (2, "bfloat16", {"context": 2, "distributed_optimizer": True}, True, "ema"),
    "experts EP2": (2, "bfloat16", {"expert": 2, "distributed_optimizer": True}, False, "frozen"),
    "LoRA TP2 SP": (2, "bfloat16", {"tensor": 2, "sequence_parallel": True}, True, "snapshot"),
    "LoRA recompute": (1, "bfloat16", {"recompute": True}, False, "frozen"),
    "LoRA PP2": (2, "bfloat16", {"pipeline": 2, "distributed_optimizer": True}, True, "frozen"),
    "LoRA CP2": (2, "float32", {"context": 2, "distributed_optimizer": True}, True, "ema"),
    "LoRA of attention": (1, "float32", {}, True, "frozen"),
    "LoRA experts EP2": (2, "bfloat16", {"expert": 2, "distributed_optimizer": True}, False, "frozen"),
    "LoRA DP2": (2, "bfloat16", {"distributed_optimizer": True}, False, "live"),
    "Qwen2 TP2 SP": (2, "bfloat16", {"tensor": 2, "sequence_parallel": True}, False, "frozen"),
    "Llama": (1, "float32", {}, True, "live"),
    "Llama, LoRA": (1, "bfloat16", {}, False, "frozen"),
    "OPSD": (1, "bfloat16", {}, False, "frozen"),
    "OPSD, LoRA PP2": (2, "float32", {"pipeline": 2}, True, "frozen"),
    "OPSD, moving average": (1, "bfloat16", {}, True, "ema"),
    "SRPO, LoRA": (1, "float32", {}, True, "frozen"),
    "SDPO, moving average": (1, "float32", {}, False, "ema"),
    "teacher prompts of 4000 tokens": (1, "float32", {"recompute": True}, True, "live"),
    "teacher prompts of 4000 tokens, TP2 SP": (2, "bfloat16", {"tensor": 2, "sequence_parallel": True}, True, "live"),
}


SLOW = {
    "fp32, KL", "bf16, snapshot", "OPSD", "OPSD, moving average", "TP2", "TP2 SP", "TP2 PP2", "PP2", "CP2",
    "TP2, one key/value head", "SDPO, moving average",
    "CP2 distributed optimizer", "LoRA of attention", "LoRA recompute", "LoRA PP2", "LoRA CP2", "LoRA DP2",
    "Llama, LoRA", "Qwen2 TP2 SP", "PP2 VPP2", "bf16, recompute", "bf16, moving average", "DP2 distributed optimizer",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in LAYOUTS])
def test_memory_is_what_the_engine_allocates(name, tmp_path):
    ranks, dtype, parallel, tied, teacher = LAYOUTS[name]
    family = name.split()[0].strip(",").lower()
    family = family if family in FAMILIES else "qwen3_moe" if "experts" in name else "qwen3"
    sizes = SIZES | (EXPERTS if "experts" in name else {}) | ({"num_key_value_heads": 1} if "one key" in name else {})
    model = make_model(tmp_path / "model", family, tied=tied, **sizes)
    attention = "attention" in name or "experts" in name  # has the adapters alone
    rollouts = [
        dataclasses.replace(r, response_ids=r.response_ids * 8, rollout_log_probs=r.rollout_log_probs * 8)
        for r in made_up_rollouts()
    ]
    if name.startswith("teacher prompts"):
        longer = [dataclasses.replace(r.prompt, teacher_ids=(r.prompt.teacher_ids * 4000)[-4000:]) for r in rollouts]
        rollouts = [dataclasses.replace(r, prompt=prompt) for r, prompt in zip(rollouts, longer, strict=True)]
    save_rollouts(rollouts, tmp_path / "rollouts.jsonl")
    objective = dataclasses.replace(GROUPS, kl_coef=0.1 * ("KL" in name))
    if preset := re.match("OPSD|SDPO|SRPO", name):
        objective = preset_objective(preset[0].lower())
    config = dataclasses.replace(
        training_config(model, objective=objective),
        model=ModelConfig(path=str(model), dtype=dtype),
        parallel=ParallelConfig(max_tokens_per_microbatch=1200, **parallel),
        teacher=TeacherConfig(weights=teacher),
        lora=LoraConfig(rank=16 * ("LoRA" in name), targets=list(ATTENTION if attention else TARGETS)),
        max_log_prob_difference=100.0,  # the rollouts are made up
    )
    for rank, (resident, peak, stage, tokens, scored) in enumerate(
        run_ranks(_measure, ranks, config, tmp_path / "rollouts.jsonl", timeout=240)
    ):
        arch = Architecture.from_pretrained(model)
        held = sum(len(r.response_ids) for r in rollouts)
        predicted = memory_of_stages(config, arch, ranks, Placement(False, False), tokens, scored, held)[stage]
        expected = dict(predicted.resident)
        if "LoRA" in name:
            expected["weights"] = expected.pop("frozen weights") + expected.pop("adapters")
        expected["teacher"] = expected.pop(f"teacher ({teacher})", 0) + expected.pop("initial weights (KL)", 0)
        assert resident == expected, f"rank {rank}"
        phases = {k: sum(v.values()) for k, v in predicted.phases.items() if k != "weight sync"}
        largest = max(phases.values())
        if name.startswith("teacher prompts"):  # a bound: 1.75 times in fp32, 1.0 in bf16 with TP 2 SP
            assert largest == phases["scoring by the teacher"] and peak < 1.1 * largest < 2 * peak, f"rank {rank}"
        else:
            assert largest == pytest.approx(peak, rel=0.1), f"rank {rank}: {phases}"


@pytest.mark.slow
def test_context_parallelism_divides_what_a_long_response_adds(tmp_path):
    """Bytes that responses of 2,000 tokens add on the largest rank; `-s` prints them (docs/guides/cluster.md)."""
    model = make_qwen3(tmp_path / "model", tied=False, **SIZES)
    rollouts = [
        dataclasses.replace(r, response_ids=(r.response_ids * 2000)[:2000], rollout_log_probs=[-1.0] * 2000)
        if r.group == 0
        else dataclasses.replace(r, reward=0.0)  # scored, not trained
        for r in made_up_rollouts()
    ]
    save_rollouts(rollouts, tmp_path / "rollouts.jsonl")
    longest = 2000 + len(rollouts[0].prompt.student_ids)
    added = {}
    for size in (1, 2, 4):
        config = training_config(model, parallel=ParallelConfig(context=size, max_tokens_per_microbatch=1))
        found = run_ranks(_measure, size, config, tmp_path / "rollouts.jsonl", timeout=400)
        added[size] = max(peak for _, peak, *_ in found)
        assert {tokens for *_, tokens, _ in found} == {config.parallel.tokens_on_a_rank(longest)}
    print("MiB added on the largest rank by CP:", {size: round(peak / 2**20, 1) for size, peak in added.items()})
    assert added[2] < 0.62 * added[1] and added[4] < 0.42 * added[1]


def _checkpoint_bytes(rank, world_size, config, path, directory):
    from megatron_egrsd.engine import checkpoint
    from megatron_egrsd.learn import learn

    with open_engine(config) as engine:
        learn(engine, load_rollouts(path), config)
        saved = checkpoint.save(engine, directory, 1, 2, {}).path
    return sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("dtype", "sharded", "teacher"),
    [
        ("bfloat16", False, "ema"),
        ("bfloat16", False, "snapshot"),
        pytest.param("float32", True, "live", marks=pytest.mark.slow),
    ],
)
def test_size_of_a_checkpoint(dtype, sharded, teacher, tmp_path):
    model = make_qwen3(tmp_path / "model", tied=False, **{**SIZES, "hidden_size": 256, "vocab_size": 4000})
    save_rollouts(made_up_rollouts(), tmp_path / "rollouts.jsonl")
    config = dataclasses.replace(
        training_config(model),
        model=ModelConfig(path=str(model), dtype=dtype),
        parallel=ParallelConfig(distributed_optimizer=sharded),
        teacher=TeacherConfig(weights=teacher),
        max_log_prob_difference=100.0,
    )
    (found,) = run_ranks(_checkpoint_bytes, 1, config, tmp_path / "rollouts.jsonl", tmp_path / "checkpoints")
    # Beside the tensors, some 300 kB of names and places.
    assert found == pytest.approx(checkpoint_bytes(config, Architecture.from_pretrained(model)), rel=0.01)
