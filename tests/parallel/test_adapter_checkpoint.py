"""Checkpoints of an adapter: resumed bit for bit, in any layout, and only beside the weights that they belong to."""

import dataclasses
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from megatron_egrsd.config import LoraConfig, OptimizerConfig, ParallelConfig, TeacherConfig
from megatron_egrsd.data.samples import save_rollouts
from megatron_egrsd.errors import BadArgument
from tests.models import make_qwen3
from tests.ranks import run_ranks
from tests.training import (
    VOCAB,
    assert_resumes_bitwise,
    assert_resumes_in,
    made_up_rollouts,
    open_engine,
    run_steps,
    training_config,
)

LORA = LoraConfig(rank=4, targets=["q_proj", "o_proj", "up_proj", "down_proj"])


@pytest.fixture
def setting(tmp_path):
    save_rollouts(made_up_rollouts(), tmp_path / "rollouts.jsonl")
    config = training_config(
        make_qwen3(tmp_path / "model", vocab_size=VOCAB),
        steps=4,
        lora=LORA,
        teacher=TeacherConfig(weights="ema", ema_decay=0.5),
        optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=1),
    )
    return config, tmp_path / "rollouts.jsonl", tmp_path


@pytest.mark.parametrize(
    ("dtype", "parallel"),
    [
        ("bfloat16", {"distributed_optimizer": True}),
        pytest.param("float32", {"tensor": 2, "sequence_parallel": True}, marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_identical(dtype, parallel, setting):
    config, rollouts, root = setting
    parallel = ParallelConfig(max_tokens_per_microbatch=256, **parallel)
    config = dataclasses.replace(config, parallel=parallel, model=dataclasses.replace(config.model, dtype=dtype))
    assert_resumes_bitwise(2, config, rollouts, root, stop=2)


def test_resume_in_another_layout(setting):
    assert_resumes_in([{"pipeline": 2, "virtual_pipeline": 2}, {"tensor": 2, "sequence_parallel": True}], *setting)


def test_what_cannot_be_continued_is_refused_in_a_sentence(setting):
    config, rollouts, root = setting
    whole = dataclasses.replace(config, lora=LoraConfig())
    run_steps(1, config, rollouts, root / "adapter", 0, 1)
    run_steps(1, whole, rollouts, root / "whole", 0, 1)

    size = {name: sum(f.stat().st_size for f in (root / name).rglob("*.distcp")) for name in ("adapter", "whole")}
    assert size["adapter"] < 0.25 * size["whole"]

    changed = shutil.copytree(root / "model", root / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    moved = shutil.copytree(root / "model", root / "moved")

    def on(path):
        return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(path)))

    wider = dataclasses.replace(config, lora=dataclasses.replace(LORA, rank=8))
    refusals = {
        "holds an adapter of rank 4, alpha 8 and targets q_proj, o_proj, up_proj, down_proj; continue it with": whole,
        "holds an adapter of rank 4, alpha 8 .* with the same lora section": wider,
        "holds an adapter of the model .*model as it was .* differ from those of model.path = .*changed": on(changed),
    }
    # The path of the model may change, its weights may not.
    *answers, nothing = run_ranks(_load, 1, root / "adapter" / "step_000001", [*refusals.values(), on(moved)])[0]
    for sentence, answer in zip(refusals, answers, strict=True):
        assert re.search(f"step_000001 {sentence}", answer), answer
    assert not nothing
    ((answer,),) = run_ranks(_load, 1, root / "whole" / "step_000001", [config])
    assert re.search(r"step_000001 holds the training of all weights; continue it with lora.rank 0", answer), answer


def _load(rank, world_size, path, configs):
    """Return the refusal of each run that would continue from `path`; "" if there is none."""
    from megatron_egrsd.engine import checkpoint

    answers = []
    for config in configs:
        with open_engine(config) as engine:
            try:
                checkpoint.load(engine, path)
                answers.append("")
            except BadArgument as error:
                answers.append(str(error))
    return answers
