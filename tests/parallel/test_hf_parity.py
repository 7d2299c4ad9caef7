"""The engine computes what Hugging Face's models compute, and their weights come out as they went in."""

import numpy as np
import pytest
import torch

from megatron_egrsd.config import Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig
from megatron_egrsd.data.packing import Sequence
from tests.models import YARN_ROPE, make_model, make_qwen3
from tests.ranks import run_ranks
from tests.training import open_engine

TEMPERATURE, VOCAB = 0.7, 61


def _sequences(vocab_size: int) -> list[Sequence]:
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 50, (9, 2), generator=g).tolist()
    draw = lambda n: torch.randint(0, vocab_size, (n,), generator=g).tolist()  # noqa: E731
    return [Sequence(draw(p), draw(r)) for p, r in lengths]


def _score(rank, world_size, model, parallel, dtype):
    """Return (scores of this replica's samples, exported weights)."""

    config = Config(
        model=ModelConfig(path=str(model), dtype=dtype),
        data=DataConfig(train="unused"),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        parallel=parallel,
    )
    with open_engine(config) as engine:
        sequences = _sequences(engine.arch.vocab_size)
        scores = engine.score(sequences, engine.partition([len(s) for s in sequences]))
        weights = {k: v.clone() for k, v in engine.export_weights()}
    return {i: (s.log_prob.numpy(), s.entropy.numpy()) for i, s in scores.items()}, {
        k: v.float().numpy() for k, v in weights.items()
    }


def _reference(model, sequences):
    """Compute fp64 log-probs and entropies from Hugging Face's fp32 logits."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for s in sequences:
        with torch.no_grad():
            logits = network(torch.tensor([[*s.prompt_ids, *s.response_ids]])).logits[0].double()
        log_p = (logits / TEMPERATURE).log_softmax(-1)[len(s.prompt_ids) - 1 : -1]
        yield log_p.gather(1, torch.tensor(s.response_ids)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize(
    ("world_size", "parallel", "tied", "experts"),
    [
        (1, ParallelConfig(max_tokens_per_microbatch=100), True, {}),
        (2, ParallelConfig(tensor=2, sequence_parallel=True), True, {}),
        (2, ParallelConfig(pipeline=2, max_tokens_per_microbatch=100), False, {}),
        (4, ParallelConfig(tensor=2, pipeline=2, max_tokens_per_microbatch=200), False, {}),
        (2, ParallelConfig(context=2, max_tokens_per_microbatch=50), False, {}),
        pytest.param(
            4, ParallelConfig(context=2, pipeline=2, max_tokens_per_microbatch=1), True, {}, marks=pytest.mark.slow
        ),
        (1, ParallelConfig(max_tokens_per_microbatch=100), False, {"num_experts": 6, "norm_topk_prob": False}),
        (
            4,
            ParallelConfig(expert=2, pipeline=2, virtual_pipeline=2, max_tokens_per_microbatch=100),
            False,
            {"num_experts": 6},
        ),
    ],
    ids=["TP1", "TP2 SP tied", "PP2 untied", "TP2 PP2 untied", "CP2", "CP2 PP2", "experts", "experts EP2 PP2 VPP2"],
)
def test_scores_and_weights(world_size, parallel, tied, experts, tmp_path):
    model = make_qwen3(tmp_path / "model", tied=tied, **experts)
    assert_same_scores_and_weights(world_size, parallel, model)


FAMILY_LAYOUTS = {
    "TP2 SP": (2, ParallelConfig(tensor=2, sequence_parallel=True, max_tokens_per_microbatch=100)),
    "PP2": (2, ParallelConfig(pipeline=2, max_tokens_per_microbatch=100)),
    "CP2": (2, ParallelConfig(context=2, max_tokens_per_microbatch=50)),
}


@pytest.mark.parametrize("layout", FAMILY_LAYOUTS)
@pytest.mark.parametrize(
    ("family", "sizes"),
    [("qwen2", {}), ("llama", {}), ("qwen3", {"rope_parameters": YARN_ROPE})],
    ids=["Qwen2", "Llama 3", "Qwen3 with YaRN"],
)
def test_families(family, sizes, layout, tmp_path):
    """The longest sequences end behind the contexts before scaling, 64 tokens, of Llama 3's rope and of YaRN."""
    model = make_model(tmp_path / "model", family, tied=layout == "TP2 SP", **sizes)
    assert_same_scores_and_weights(*FAMILY_LAYOUTS[layout], model)


def assert_same_scores_and_weights(world_size, parallel, model):
    from safetensors.torch import load_file

    found = run_ranks(_score, world_size, model, parallel, "float32")
    scores, weights = {i: s for own, _ in found for i, s in own.items()}, found[0][1]
    assert len(scores) == 9
    assert sum(len(own) for own, _ in found) == 9 * parallel.model_parallel, "a rank of a replica lacks scores"
    assert all(np.array_equal(own[i], scores[i]) for own, _ in found for i in own), "differs from rank to rank"
    assert not any(weights for _, weights in found[1:]), "only the first rank exports"
    for i, (log_prob, entropy) in enumerate(_reference(model, _sequences(VOCAB))):
        torch.testing.assert_close(torch.from_numpy(scores[i][0]).double(), log_prob, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(scores[i][1]).double(), entropy, rtol=0, atol=1e-5)
    stored = load_file(model / "model.safetensors")
    assert weights.keys() == stored.keys()
    assert all(torch.equal(torch.from_numpy(weights[k]), stored[k]) for k in stored)


def test_bfloat16_stays_close_to_fp32(tmp_path):
    model = make_qwen3(tmp_path / "model")
    scores, _ = run_ranks(_score, 1, model, ParallelConfig(), "bfloat16")[0]
    errors = torch.cat(
        [
            (torch.from_numpy(scores[i][0]).double() - log_prob).abs()
            for i, (log_prob, _) in enumerate(_reference(model, _sequences(VOCAB)))
        ]
    )
    # bf16 keeps 8 bits: a few hundredths of a nat on average, and never the garbage of a wrong layout.
    assert errors.mean() < 0.1 and errors.max() < 1.0
