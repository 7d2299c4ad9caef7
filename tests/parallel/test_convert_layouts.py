"""A converted checkpoint is what megatron-core itself loads and saves, at any layout, uneven ones included."""

from pathlib import Path

import pytest
import torch

from megatron_egrsd.hf.checkpoint import HFCheckpoint
from megatron_egrsd.hf.convert import ToHF, ToMegatron
from tests.models import LLAMA3_ROPE, make_model, make_qwen3
from tests.parallel.test_transformer_engine import HEAD_NORMS, NORM_BEFORE_EXPERTS, NORMS
from tests.ranks import run_ranks

VOCAB, LAYERS = 61, 3  # neither divides evenly
TOKENS = torch.randint(0, VOCAB, (23,), generator=torch.Generator().manual_seed(1))
# name -> (tensor, pipeline, layers of the last stage)
LAYOUTS = {"TP1": (1, 1, None), "TP2": (2, 1, None), "PP2": (1, 2, 1), "TP4": (4, 1, None), "TP2 PP2": (2, 2, 1)}
# The naming options of megatron-core: stacked layers, one tensor per layer, gate and up apart.
NAMES = {"TP1": {"non_homogeneous_layers": True}, "TP2": {"singleton_local_shards": True}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: (Hugging Face directory, converted directory)}."""
    root = tmp_path_factory.mktemp("convert")
    found = {}
    rope = LLAMA3_ROPE | {"original_max_position_embeddings": 8192}  # Megatron-LM has no other
    for name, family, sizes in (
        ("tied", "qwen3", {}), ("untied", "qwen3", {"tied": False}), ("qwen2", "qwen2", {"tied": False}),
        ("llama", "llama", {"rope_parameters": rope}),
    ):  # fmt: skip
        hf = make_model(
            root / f"hf-{name}", family, seed=3, vocab_size=VOCAB, num_hidden_layers=LAYERS,
            num_attention_heads=8, num_key_value_heads=4, **sizes,
        )  # fmt: skip
        ToMegatron(hf, root / f"megatron-{name}").run()
        found[name] = hf, root / f"megatron-{name}"
    return found


def hf_logits(path: Path) -> torch.Tensor:
    """[T, V] of transformers, fp32."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(TOKENS[None]).logits[0]


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=pytest.mark.slow if x in ("TP4", "TP2", "PP2") else ()) for x in LAYOUTS]
)
def test_megatron_core_loads_the_checkpoint_and_its_own_is_read(layout, models, tmp_path):
    tensor, pipeline, last = LAYOUTS[layout]
    check(models, (tensor, pipeline, last, 1), NAMES.get(layout, {}), tmp_path)


@pytest.fixture(scope="module")
def expert_models(tmp_path_factory):
    """Mixtures of experts, normalising the chosen experts' weights or not."""
    root = tmp_path_factory.mktemp("convert-moe")
    found = {}
    for normalized in (True, False):
        hf = make_qwen3(
            root / f"hf-{normalized}", tied=False, seed=5, vocab_size=VOCAB, num_hidden_layers=LAYERS, num_experts=6,
            num_attention_heads=8, num_key_value_heads=4, norm_topk_prob=normalized,
        )  # fmt: skip
        ToMegatron(hf, root / f"megatron-{normalized}").run()
        found[normalized] = hf, root / f"megatron-{normalized}"
    return found


EXPERT_LAYOUTS = {"TP1": (1, 1, None, 1), "EP2": (1, 1, None, 2), "TP2": (2, 1, None, 1), "PP2": (1, 2, 1, 1),
                  "PP2 EP2": (1, 2, 1, 2)}  # fmt: skip


@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=pytest.mark.slow if x not in ("TP1", "EP2") else ()) for x in EXPERT_LAYOUTS]
)
def test_experts(layout, expert_models, tmp_path):
    check(expert_models, EXPERT_LAYOUTS[layout], NAMES.get(layout, {}), tmp_path)


def check(models, layout, names, directory) -> None:
    """Check megatron-core's logits from a converted checkpoint at `layout`, and the reader of its own saves."""
    tensor, pipeline, _, expert = layout
    jobs = [(str(converted), str(directory / f"saved-{key}"), names) for key, (_, converted) in models.items()]
    answers = run_ranks(_load_and_save, tensor * pipeline * expert, layout, jobs)[-1]
    for (key, (hf, _)), logits in zip(models.items(), answers, strict=True):
        assert torch.from_numpy(logits).sub(hf_logits(hf)).abs().max() < 1e-5
        ToHF(directory / f"saved-{key}", directory / f"again-{key}", like=hf).run()
        assert_same_tensors(hf, directory / f"again-{key}")


def assert_same_tensors(expected: Path, found: Path) -> None:
    left, right = HFCheckpoint(expected), HFCheckpoint(found)
    for name in left.names():
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name


def _load_and_save(rank, world_size, layout, jobs):
    """Return logits [T, V] of each job's converted checkpoint, on the last rank; megatron-core saves each again."""
    from megatron.core import dist_checkpointing

    from megatron_egrsd.config import ParallelConfig
    from megatron_egrsd.engine import distributed
    from megatron_egrsd.engine.model import build_model, transformer_config
    from megatron_egrsd.hf.megatron_checkpoint import MegatronCheckpoint

    tensor, pipeline, last, expert = layout
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert)
    distributed.initialize(parallel, seed=0)
    answers = []
    for source, target, names in jobs:
        checkpoint = MegatronCheckpoint(source)
        config = transformer_config(checkpoint.architecture, parallel, torch.float32)
        config.num_layers_in_last_pipeline_stage = last
        (model,) = build_model(checkpoint.architecture, config, parallel)
        model.eval()
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, float("nan"))  # a parameter that is not loaded stays nan
        state, missing, unexpected = dist_checkpointing.load(
            {"model": model.sharded_state_dict()}, str(checkpoint.directory), strict="return_all", verify_integrity=True
        )
        # Exactly the keys that this model requests, and the keys that it would request with Transformer Engine's norms.
        norms = NORMS | (HEAD_NORMS if checkpoint.architecture.family.qk_norm else set())
        norms |= {NORM_BEFORE_EXPERTS} if checkpoint.architecture.num_experts else set()
        assert missing == norms and not unexpected, (missing, unexpected)
        model.load_state_dict(state["model"])
        assert state["args"].num_layers == LAYERS
        answers.append(_logits(model, parallel))
        Path(target).mkdir(exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save({"model": model.sharded_state_dict(metadata=names)}, target)
    distributed.shutdown()
    return answers


@torch.no_grad()
def _logits(model, parallel):
    """Return [T, V] numpy on the last stage, None elsewhere."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    ends = torch.tensor([0, len(TOKENS)], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=len(TOKENS), max_seqlen_kv=len(TOKENS)
    )
    hidden = torch.empty(len(TOKENS), 1, model.config.hidden_size)
    if not model.pre_process:
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    output = model(TOKENS[None], torch.arange(len(TOKENS))[None], None, packed_seq_params=packed)
    if not model.post_process:
        dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    return gather_from_tensor_model_parallel_region(output)[0, :, :VOCAB].contiguous().numpy()
