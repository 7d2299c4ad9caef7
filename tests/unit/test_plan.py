"""The dry run: the whole plan of a run of any size in one process, and a reason for each that cannot work."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_egrsd import cli
from megatron_egrsd.config import Config, DataConfig, ModelConfig, ParallelConfig
from megatron_egrsd.config.lora import TARGETS
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.samples import Problem, Prompt
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.evaluation.evaluated_model import hugging_face
from megatron_egrsd.hf.adapters import AdapterSpec, adapter_parameters
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.planning.activations import Placement
from megatron_egrsd.planning.fit import Longest, longest_sequences, memory_of_stages, placement, remedy
from megatron_egrsd.planning.plan import Plan, _add_weights, checkpoint_bytes, print_plan, resolve
from megatron_egrsd.planning.preflight import prepare
from megatron_egrsd.rollout.server_command import check_served_adapters, check_served_model, first_gpu
from tests.adapters import random_adapter
from tests.models import make_qwen3
from tests.published import PUBLISHED

ROOT = Path(__file__).parents[2]
PROMPTS = [Prompt(Problem(str(i), "p", "a", "s"), [1] * (300 + i), [1] * (900 + i)) for i in range(1000)]
GIB = 2**30
# All weights are trained, in the layout for it; the configuration trains adapters.
FULL = ["--lora.rank", "0", "--parallel.tensor", "4", "--parallel.sequence_parallel", "true"]


@pytest.fixture
def model(tmp_path):
    """Return a function that makes a model directory with the files that a plan reads: sizes and a tokenizer."""

    def make(name: str) -> Path:
        path = tmp_path / name
        shutil.copytree(ROOT / "examples/tiny/model", path, ignore=shutil.ignore_patterns("*.safetensors"))
        (path / "config.json").write_text(json.dumps(PUBLISHED[name]))
        return path

    return make


def config_8b(path: Path, *words: str):
    return parse_config(
        ["--config", str(ROOT / "examples/configs/qwen3_8b_cl_egrsd.yaml"), "--model.path", str(path),
         "--output", str(path.parent / "run"), *FULL, *words]
    )  # fmt: skip


@pytest.mark.heavy
def test_512_ranks_in_one_process(model, tmp_path):
    arguments = ["--model.path", model("Qwen3-8B"), "--data.train", "examples/tiny/train.jsonl", "--output",
                 tmp_path / "run", "--data.evaluation", "examples/tiny/heldout.jsonl"]  # fmt: skip
    command = [sys.executable, "-m", "megatron_egrsd.cli", "train", "--config",
               "examples/configs/qwen3_8b_cl_egrsd.yaml", *arguments, "--dry-run", "--world-size", "512",
               "--gpu-memory", "80GB", "--checkpoint.every", "0", *FULL, "--rollout.rollouts_per_prompt", "8",
               "--rollout.max_response_tokens", "8192"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    room = shutil.disk_usage(tmp_path).free > 16 * GIB  # for the final model
    assert done.returncode == (0 if room else 2), done.stderr
    for line in (
        "model       8,190,735,360 parameters, 36 layers, bfloat16",
        "vocabulary  151,936 tokens, padded to 151,936 (37,984 a tensor-parallel rank)",
        "layout      512 ranks = TP 4 x PP 1 x DP 128, sequence parallel, distributed optimizer, recomputation",
        "batch       32 prompts x 8 rollouts = 256 a step, 256 an update, 2 of them a data-parallel rank",
    ):
        assert done.stdout.count(line) == 1, done.stdout
    for term in ("weights", "gradients (fp32)", "optimizer", "CUDA runtime", "activations", "total"):
        assert re.search(rf"^ +{re.escape(term)} +[\d.]+ [MG]iB", done.stdout, re.M), term
    assert not (tmp_path / "run").exists()


def test_other_ranks_say_nothing(model, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    print_plan(config_8b(model("Qwen3-8B")), 8)
    assert capsys.readouterr().out == ""


def refusals(plan, word: str) -> list[str]:
    """Return the refusals that contain `word`: others, as for disk space, depend on the machine."""
    return [reason for reason in plan.refusals if word in reason]


@pytest.mark.parametrize(
    ("name", "ranks", "words"),
    [
        ("Qwen3-8B", 8, ["--parallel.tensor", "2", "--parallel.distributed_optimizer", "false"]),
        ("Qwen3-8B", 8, ["--parallel.recompute", "false", "--parallel.max_tokens_per_microbatch", "40000"]),
        ("Qwen3-32B", 16, []),
    ],
)
def test_too_little_memory_is_refused_with_a_change_that_fits(name, ranks, words, model):
    path = model(name)
    plan = resolve(config_8b(path, *words), PROMPTS, PROMPTS[:8], ranks, 60 * GIB)
    (reason,) = refusals(plan, "but a GPU has")
    assert re.match(r"rank \d+ needs [\d.]+ GiB but a GPU has 60\.00 GiB; it fits with --parallel", reason), reason
    remedy = reason.partition("it fits with ")[2].replace(",", "").split()
    changed = resolve(config_8b(path, *words, *remedy), PROMPTS, PROMPTS[:8], ranks, 60 * GIB)
    assert not refusals(changed, "but a GPU has")


ALONE = ["--parallel.tensor", "1", "--parallel.sequence_parallel", "false", "--parallel.expert", "8"]


@pytest.mark.parametrize(
    ("name", "ranks", "gib", "words", "remedy"),
    [
        ("Qwen3-30B-A3B", 8, 80, [], "--parallel.expert 8"),
        ("Qwen3-30B-A3B", 16, 70, [*ALONE, "--rollout.max_response_tokens", "100000"],
         "--parallel.tensor 4, --parallel.sequence_parallel true"),
        ("Qwen3-30B-A3B", 64, 40, ["--parallel.expert", "8"], "--parallel.tensor 8"),  # of 4 key/value heads
        ("Qwen3-235B-A22B", 256, 30,
         ["--parallel.tensor", "8", "--parallel.expert", "64", "--rollout.prompts_per_step", "256"],
         "--parallel.pipeline 4, --parallel.pipeline_layout [24,24,24,22]"),
    ],
)  # fmt: skip
def test_the_change_for_a_mixture_is_one_that_training_takes(name, ranks, gib, words, remedy, model):
    path = model(name)
    (reason,) = refusals(resolve(config_8b(path, *words), PROMPTS, [], ranks, gib * GIB), "but a GPU has")
    assert reason.endswith(f"it fits with {remedy}"), reason
    changed = config_8b(path, *words, *remedy.replace(", ", " ").split())
    Architecture.from_pretrained(path).check_parallel(changed.parallel)
    assert not refusals(resolve(changed, PROMPTS, [], ranks, gib * GIB), "but a GPU has")


def test_no_layout_is_advised_that_the_adapters_cannot_have(model, monkeypatch):
    """Ranks that share a key/value head, of which this model has four, have no adapters of it."""
    path = model("Qwen3-30B-A3B")

    def eight_fit(config, *_):
        return [SimpleNamespace(total=0 if config.parallel.tensor == 8 else 2)]

    monkeypatch.setattr("megatron_egrsd.planning.fit.memory_of_stages", eight_fit)
    adapters = ["--lora.rank", "16", "--lora.targets", '["q_proj","k_proj","v_proj","o_proj"]']
    for words, advice in (([], "it fits with --parallel.tensor 8"), (adapters, "it takes more GPUs")):
        arch, place = Architecture.from_pretrained(path), Placement(True, True)
        assert remedy(config_8b(path, *words), arch, 64, place, Longest(1000, 1000), 1).endswith(advice)


def test_a_teacher_that_nothing_reads_is_not_counted(model):
    path, words = model("Qwen3-8B"), ["--objective.mix", "0", "--teacher.weights", "ema"]
    for attenuation, counted in (("0.3", True), ("0", False)):
        config = config_8b(path, *words, "--objective.attenuation", attenuation)
        stages = memory_of_stages(config, Architecture.from_pretrained(path), 4, Placement(False, False), 16384)
        for rank in stages:
            assert ("scoring by the teacher" in rank.phases) is ("teacher (ema)" in rank.resident) is counted


def test_responses_too_long_for_a_rank(model):
    """If TP and PP are exhausted, context parallelism makes 121k tokens fit: 30k on each of four ranks."""
    words = ["--rollout.max_response_tokens", "120000", "--parallel.tensor", "8", "--teacher.weights", "live"]
    path = model("Qwen3-8B")
    plan = resolve(config_8b(path, *words), PROMPTS, [], 64, int(15.4 * GIB))
    (reason,) = refusals(plan, "but a GPU has")
    assert reason.startswith("rank 0 needs 22.04 GiB") and reason.endswith("it fits with --parallel.context 4"), reason
    plan = resolve(config_8b(path, *words, "--parallel.context", "4"), PROMPTS, [], 64, int(15.4 * GIB))
    assert not refusals(plan, "but a GPU has")
    lines = "\n".join(plan.lines)
    assert "64 ranks = TP 8 x PP 1 x CP 4 x DP 2, sequence parallel" in lines
    assert "sequences of at most 121,299 tokens, 30,326 of them on each CP rank, in micro-batches of" in lines
    assert "the teacher scores sequences of at most 121,899 tokens" in lines
    assert "30,326 tokens a micro-batch" in lines and "15.30 GiB of 15.40 GiB" in lines


def test_a_model_that_no_layout_of_so_many_gpus_holds(model):
    plan = resolve(config_8b(model("Qwen3-32B")), PROMPTS, [], 4, 16 * GIB)
    assert len(refusals(plan, "it takes more GPUs")) == 1


def test_the_worst_rank_is_named(model):
    """First stages hold the activations of more micro-batches, the last one the LM head."""
    path = model("Qwen3-8B")
    plan = resolve(config_8b(path, "--parallel.pipeline", "4"), PROMPTS, [], 64, None)
    config, arch = config_8b(path, "--parallel.pipeline", "4"), Architecture.from_pretrained(path)
    totals = [memory.total for memory in memory_of_stages(config, arch, 64, Placement(False, False), 16384)]
    worst = totals.index(max(totals))
    assert any(f"of rank {worst * 16} (pipeline stage {worst})" in line for line in plan.lines), plan.lines


def test_servers_that_cannot_hold_one_response(model):
    words = ["--parallel.tensor", "8", "--rollout.max_response_tokens", "8192"]
    plan = resolve(config_8b(model("Qwen3-32B"), *words), PROMPTS, [], 64, 68 * GIB)
    assert len(refusals(plan, "less than the 9,491 of one longest response")) == 1
    plan = resolve(config_8b(model("Qwen3-8B"), *words), PROMPTS, [], 64, 68 * GIB)
    assert not refusals(plan, "longest response")


def test_colocated_ranks_say_what_waits_in_host_memory(model):
    words = ["--rollout.servers.colocated", "true", "--rollout.sync.transport", "ipc"]
    plan = resolve(config_8b(model("Qwen3-8B"), *words), PROMPTS, [], 8, 80 * GIB)
    [line] = [line for line in plan.lines if "in host memory" in line]
    # TP 4, DP 2: bf16 weights, those of the frozen teacher, a half of fp32 weights and moments
    held = 8_190_735_360 / 4 * (2 + 2 + 12 / 2) / GIB
    assert float(line.split()[-7]) == pytest.approx(held, rel=0.001) and "for 8 ranks" in line, line
    assert any("in turns with the training ranks" in line for line in plan.lines)


@pytest.mark.parametrize(
    ("weights", "resident", "saved"), [("live", 0, 0), ("frozen", 2, 0), ("ema", 4, 4), ("snapshot", 2, 2)]
)
def test_the_teachers_bytes_a_parameter(weights, resident, saved, model):
    """A frozen teacher is read again from model.path. A copy has the type of the weights, a moving average is fp32."""
    path = model("Qwen3-8B")
    arch, config = Architecture.from_pretrained(path), config_8b(path, "--teacher.weights", weights)
    memory = memory_of_stages(config, arch, 4, Placement(False, False), 16384)[0]
    own = memory.resident["weights"] // 2
    assert memory.resident.get(f"teacher ({weights})", 0) == resident * own
    words = ["--teacher.weights", weights, "--objective.mix", "0", "--objective.attenuation", "0"]
    ungated = config_8b(path, *words)  # needs no teacher
    without = checkpoint_bytes(ungated, arch)
    assert without == arch.num_parameters * (2 + 8 + 4)
    assert checkpoint_bytes(config, arch) - without == saved * arch.num_parameters
    assert f"teacher ({weights})" not in memory_of_stages(ungated, arch, 4, Placement(False, False), 16384)[0].resident


@pytest.mark.parametrize(
    ("weights", "copies", "saved"), [("live", 0, 0), ("frozen", 0, 0), ("ema", 4, 4), ("snapshot", 2, 2)]
)
def test_adapters_alone_have_gradients_adam_and_a_teacher(weights, copies, saved, model):
    """Two bytes a parameter for the frozen weights, and no second copy of them for a teacher or a KL reference."""
    path = model("Qwen3-8B")
    arch = Architecture.from_pretrained(path)
    words = [*LORA, "--parallel.sequence_parallel", "false"]
    config = config_8b(path, *words, "--teacher.weights", weights, "--objective.kl_coef", "0.1")
    adapter = adapter_parameters(arch, AdapterSpec(64, 128, TARGETS))
    memory = memory_of_stages(config, arch, 1, Placement(False, False), 16384)[0]
    expected = {
        "frozen weights": 2 * arch.num_parameters,
        "adapters": 2 * adapter,
        "gradients (fp32)": 4 * adapter,
        "optimizer": 12 * adapter,
        f"teacher ({weights})": copies * adapter,
    }
    assert memory.resident == {name: size for name, size in expected.items() if size}
    assert not any("gradient of the weight" in name for phase in memory.phases.values() for name in phase)
    assert checkpoint_bytes(config, arch) == (2 + 8 + 4 + saved) * adapter


def test_the_plan_of_adapters(model, tmp_path):
    path = model("Qwen3-8B")
    words = ["--lora.rank", "64", "--checkpoint.every", "1"]
    lines = "\n".join(resolve(config_8b(path, *words), PROMPTS, [], 4, 80 * GIB).lines)
    assert (
        "LoRA r 64, alpha 128, on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj: 174,587,904" in lines
    )
    assert (
        "(2.13%) are trained" in lines
        and "final model 15.26 GiB + adapter 333.00 MiB + 3 checkpoints of 2.28 GiB" in lines
    )
    alone = "\n".join(resolve(config_8b(path, *words, "--lora.export", "adapter"), PROMPTS, [], 4).lines)
    assert "  final adapter 333.00 MiB + 3 checkpoints" in alone
    random_adapter(tmp_path / "adapter", ROOT / "examples/tiny/model", AdapterSpec(3, 5.0, ("v_proj", "q_proj")))
    init = config_8b(ROOT / "examples/tiny/model", "--lora.init", str(tmp_path / "adapter"))
    assert "LoRA r 3, alpha 5, on q_proj, v_proj" in "\n".join(resolve(init, PROMPTS, [], 4).lines)


UNTRUNCATED = ["--rollout.top_p", "1", "--rollout.top_k", "0"]  # as an importance weight needs it


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (["--objective.preset", "rlcsd", *UNTRUNCATED], 5),  # a right rollout and four wrong ones
        (["--objective.preset", "rlcsd", "--rollout.rollouts_per_prompt", "4", *UNTRUNCATED], 3),
        (["--data.teacher_context", "sibling", "--rollout.rollouts_per_prompt", "4"], 1),
    ],
)
def test_the_plan_names_the_rollouts_that_the_teacher_reads(words, most, model):
    lines = "\n".join(resolve(config_8b(model("Qwen3-8B"), *words), PROMPTS, [], 4).lines)
    assert f"the teacher scores each response after {most} or fewer others of its prompt" in lines


def test_the_plan_names_the_vote_that_the_teacher_reads(model):
    words = ["--data.teacher_context", "majority", "--rollout.rollouts_per_prompt", "4"]
    lines = "\n".join(resolve(config_8b(model("Qwen3-8B"), *words), PROMPTS, [], 4).lines)
    assert "the teacher reads the answer that most of the 4 rollouts of a prompt give" in lines
    assert "or fewer others of its prompt" not in lines


def test_adapters_are_advised_where_nothing_else_fits(model):
    plan = resolve(config_8b(model("Qwen3-32B")), PROMPTS, [], 4, 80 * GIB)
    (reason,) = refusals(plan, "but a GPU has")
    assert reason.endswith("makes it fit; adapters alone would fit: --lora.rank 64"), reason
    changed = config_8b(model("Qwen3-8B").parent / "Qwen3-32B", "--lora.rank", "64")
    assert not refusals(resolve(changed, PROMPTS, [], 4, 80 * GIB), "but a GPU has")


def test_an_adapter_that_the_model_cannot_have_is_refused_before_anything_starts(model, tmp_path):
    experts = config_8b(model("Qwen3-30B-A3B"), "--lora.rank", "8", "--data.train", "examples/tiny/train.jsonl")
    with pytest.raises(BadArgument, match="the experts of a mixture get no adapter"):
        prepare(experts, 4)
    other = random_adapter(tmp_path / "adapter", ROOT / "examples/tiny/model", AdapterSpec(2, 4.0, TARGETS))
    init = config_8b(model("Qwen3-8B"), "--lora.init", str(other), "--data.train", "examples/tiny/train.jsonl")
    with pytest.raises(BadArgument, match="the adapter is not one of this model"):
        prepare(init, 4)


def test_half_of_a_fused_matrix_is_not_served_as_an_adapter():
    for served in (TARGETS, ("q_proj", "k_proj", "v_proj", "down_proj"), ("o_proj",)):
        check_served_adapters(served)
    words = ["--data.train", "examples/tiny/train.jsonl", "--rollout.sync.lora", "adapter", "--rollout.sync.transport"]
    words += ["ipc", "--parallel.tensor", "1", "--parallel.sequence_parallel", "false", "--output", "no/such"]
    for half in (["q_proj", "v_proj"], ["up_proj"]):
        lora = ["--lora.rank", "4", "--lora.targets", json.dumps(half)]
        with pytest.raises(BadArgument, match=r"on all of \w+_proj, .* or on none; change lora\.targets"):
            prepare(config_8b(ROOT / "examples/tiny/model", *words, *lora), 4)


def test_a_tied_mixture_is_not_sampled_from(tmp_path):
    tied, untied = (make_qwen3(tmp_path / str(tied), tied=tied, num_experts=4) for tied in (True, False))
    check_served_model(Architecture.from_pretrained(untied))
    with pytest.raises(BadArgument, match="has experts and ties its embeddings, which SGLang ignores"):
        prepare(config_8b(tied, "--parallel.tensor", "2", "--data.train", "examples/tiny/train.jsonl"), 2)
    evaluated = parse_config(["--model.path", str(tied), "--data.train", "-", "--output", str(tmp_path / "out")])
    with pytest.raises(BadArgument, match="ties its embeddings"), hugging_face(evaluated):
        pass


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["--objective.preset", "antisd"], True),
        (["--objective.preset", "srpo", "--data.teacher_context", "template"], True),
        (["--objective.preset", "antisd", "--objective.advantage", "outcome"], False),
        (["--objective.preset", "opsd", "--objective.advantage", "group"], False),  # every rollout is trained
    ],
)
def test_groups_of_one_rollout_are_refused_for_a_function_too(words, refused, model):
    path, data = model("Qwen3-8B"), ["--data.train", "examples/tiny/train.jsonl"]
    config = config_8b(path, *data, *words, "--rollout.rollouts_per_prompt", "1")
    with pytest.raises(BadArgument, match="so that every advantage is 0") if refused else contextlib.nullcontext():
        prepare(config, 4)


def test_a_signal_that_begins_with_the_second_step_is_no_comparison_within_groups(model, tmp_path):
    (tmp_path / "mine.py").write_text("""
from megatron_egrsd.objectives import Objective
class Mine(Objective):
    def advantages(self, rewards, group_ids):
        return (rewards - self.history.mean) * (self.history.steps > 0)
    def weight(self, tokens):
        return tokens.advantage
""")
    words = ["--data.train", "examples/tiny/train.jsonl", "--objective.function", f"{tmp_path / 'mine.py'}:Mine"]
    prepare(config_8b(model("Qwen3-8B"), *words, "--objective.advantage", "group"), 4)


@pytest.mark.parametrize(
    ("ranks", "gpus", "engines", "words", "first", "refused"),
    [
        (4, 8, 4, [], 4, ""),
        (4, 8, 2, ["--rollout.servers.args.base_gpu_id", "6"], 6, ""),
        (4, 8, 2, ["--rollout.servers.args", '{"base-gpu-id": 6}'], 6, ""),
        (8, 8, 1, [], 0, "would begin at GPU 0"),
        (8, 8, 4, ["--rollout.servers.args.base_gpu_id", "4"], 4, "would begin at GPU 4"),
        (8, 8, 1, ["--rollout.sync.transport", "ipc"], 0, ""),
        (8, 8, 8, ["--rollout.sync.transport", "ipc", "--rollout.servers.colocated", "true"], 0, ""),
        (8, 8, 1, ["--rollout.servers.urls", '["http://10.0.0.3:30000"]'], 0, ""),
        (8, 4, 1, ["--rollout.sync.transport", "ipc"], 0, r"has 4 GPU\(s\), too few for its 8"),
        (8, 8, 9, ["--rollout.sync.transport", "ipc"], 0, "need GPUs up to number 8, .* this node has 8"),
    ],
)
@pytest.mark.heavy
def test_servers_begin_behind_the_gpus_of_the_ranks(ranks, gpus, engines, words, first, refused, model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=200 * GIB))
    monkeypatch.setattr("megatron_egrsd.planning.plan.free_bytes", lambda _: 1 << 50)
    config = config_8b(model("Qwen3-8B"), "--rollout.servers.engines", str(engines), "--data.train",
                       "examples/tiny/train.jsonl", *words)  # fmt: skip
    assert first_gpu(config.rollout.servers, ranks, gpus) == first
    if refused:
        with pytest.raises(BadArgument, match=refused):
            prepare(config)
    else:
        prepare(config)
    # A dry run says the same, but not where it plans another machine.
    with pytest.raises(BadArgument, match=refused) if refused else contextlib.nullcontext():
        print_plan(config)
    print_plan(config, ranks)


@pytest.mark.parametrize(
    ("environment", "words", "reason"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ["--debug", "rollout-only"], "run it without torchrun"),
        ({}, ["--debug", "rollout-only", "--parallel.tensor", "2"], "run it without torchrun and parallel sizes"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ["--rollout.sync.transport", "ipc"], "the first node alone"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, ["--rollout.sync.transport", "ipc"], ""),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, [], ""),
    ],
)
def test_processes_that_would_not_serve_the_run_are_refused(environment, words, reason, model, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    urls = ["--rollout.servers.urls", '["http://10.0.0.3:30000"]']
    config = config_8b(model("Qwen3-8B"), "--data.train", "examples/tiny/train.jsonl", *urls, *words)
    with pytest.raises(BadArgument, match=reason) if reason else contextlib.nullcontext():
        prepare(config)
    if config.debug:
        with pytest.raises(BadArgument, match=reason):  # --dry-run --world-size
            prepare(config, 2)


def test_ports_that_are_taken(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        plan = resolve(config_8b(model("Qwen3-8B"), "--rollout.servers.port", str(port)), PROMPTS, [], 4)
        assert any(f"port {port} on 127.0.0.1 cannot be used" in reason for reason in plan.refusals)
    last = config_8b(model("Qwen3-4B"), "--rollout.servers.port", "65535", "--rollout.servers.engines", "2")
    assert any("leaves no ports for 2 servers" in reason for reason in resolve(last, PROMPTS, [], 4).refusals)


def test_disk(model):
    path = model("Qwen3-8B")
    every, many = ["--checkpoint.every", "1"], ["--checkpoint.keep", "100000", "--steps", "200000"]
    plan = resolve(config_8b(path, *every, *many), PROMPTS, [], 4)
    assert any(re.search(r"needs [\d.]+ TiB of disk, and .* are free", reason) for reason in plan.refusals)
    assert any("15.26 GiB + 100001 checkpoints of 106.80 GiB" in line for line in plan.lines), plan.lines
    few = resolve(config_8b(path, *every, *many, "--checkpoint.every", "20", "--steps", "50"), PROMPTS, [], 4)
    assert any("15.26 GiB + 3 checkpoints of 106.80 GiB" in line for line in few.lines), few.lines  # 20, 40, 50
    assert not any("while a checkpoint is written" in line for line in plan.lines)
    plan = resolve(config_8b(path, "--checkpoint.every", "1", "--checkpoint.asynchronous", "true"), PROMPTS, [], 4)
    assert any("while a checkpoint is written: 106.80 GiB over all ranks" in line for line in plan.lines), plan.lines


LORA = ["--lora.rank", "64", "--parallel.tensor", "1", "--parallel.sequence_parallel", "false"]


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        ([], "weight sync 15.26 GiB"),
        ([*LORA], "weight sync 15.26 GiB"),
        ([*LORA, "--rollout.sync.lora", "adapter"], "weight sync 333.00 MiB"),
        (["--objective.preset", "sft"], ""),
        (["--debug", "train-only", "--replay", "."], ""),
    ],
)
def test_disk_of_the_weight_sync(words, sent, model):
    disk = ["--rollout.sync.transport", "disk"]
    lines = "\n".join(resolve(config_8b(model("Qwen3-8B"), *disk, *words), PROMPTS, [], 4).lines)
    assert sent in lines and ("weight sync" in lines.partition("output")[2]) is bool(sent), lines


def test_a_cache_that_holds_no_longest_response_is_refused(model):
    path, longest = model("Qwen3-8B"), 1299 + 8192  # the longest prompt of PROMPTS and its response
    words = ["--rollout.max_response_tokens", "8192", "--rollout.servers.max_total_tokens"]
    for gpu_memory in (None, 80 * GIB):
        plan = resolve(config_8b(path, *words, str(longest + 1)), PROMPTS, [], 4, gpu_memory)
        (reason,) = refusals(plan, "max_total_tokens")
        assert reason.endswith(f"raise it to {longest + 2:,} or more")
        plan = resolve(config_8b(path, *words, str(longest + 2)), PROMPTS, [], 4, gpu_memory)
        assert not refusals(plan, "max_total_tokens")
    assert any(f"holds about {longest + 2:,} tokens" in line for line in plan.lines), plan.lines


def test_the_teachers_longer_sequences_count(model):
    path, longer = model("Qwen3-8B"), [Prompt(p.problem, p.student_ids, [1] * 39_000) for p in PROMPTS]
    words = ["--rollout.max_response_tokens", "1000", "--parallel.max_tokens_per_microbatch", "1000"]
    short, long = ("\n".join(resolve(config_8b(path, *words), x, [], 128).lines) for x in (PROMPTS, longer))
    for lines, scored in ((short, "2,899"), (long, "40,000")):
        assert "of at most 2,299 tokens in" in lines and f"scores sequences of at most {scored} tokens" in lines
    assert "at the peak, the scoring by the teacher:" in long and "scoring" not in short
    siblings = config_8b(path, *words, "--data.teacher_context", "sibling", "--rollout.rollouts_per_prompt", "4")
    assert longest_sequences(siblings, PROMPTS).scored == siblings.data.max_prompt_tokens + 1000


def test_an_output_that_cannot_be_written_is_refused(model, tmp_path, monkeypatch):
    config = config_8b(model("Qwen3-8B"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(BadArgument, match=f"output = {tmp_path}/run cannot be written, because {tmp_path} is not wri"):
        prepare(config, 4)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--world-size", "8"], "--world-size goes with --dry-run"),
        (["--gpu-memory", "80GB"], "--gpu-memory goes with --dry-run"),
        (["--dry-run", "--world-size", "none"], "--world-size is 'none'; it must be a positive whole number"),
        (["--dry-run", "--world-size", "0"], "--world-size is '0'"),
        (["--dry-run", "--world-size"], "--world-size: expected one argument"),
        (["--dry-run", "--gpu-memory", "much"], "--gpu-memory is 'much'; give a size such as 80GB"),
        (["--dry-run", "--gpu-memory", "80"], "--gpu-memory is '80'"),
    ],
)
def test_mistakes(words, reason, capsys):
    assert cli.main(["train", "--model.path", "m", "--data.train", "t.jsonl", *words]) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1


def test_a_world_that_does_not_divide(model):
    with pytest.raises(BadArgument, match="6 training ranks do not divide"):
        print_plan(config_8b(model("Qwen3-8B")), 6)


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("fp_8", r"parallel.megatron.fp_8 is no field of megatron-core's TransformerConfig; did you mean fp8\?"),
        ("num_layers", "parallel.megatron.num_layers is not among the fields that only change how"),
        ("fp8_param", "parallel.megatron.fp8_param stores the weights in FP8"),
        ("tp_comm_overlap", "parallel.megatron.tp_comm_overlap sends through buffers of one length"),
    ],
)
def test_fields_of_megatron_core(field, reason, model):
    path = model("Qwen3-8B")
    with pytest.raises(BadArgument, match=reason):
        resolve(config_8b(path, f"--parallel.megatron.{field}", "1"), PROMPTS, [], 4)
    lines = resolve(config_8b(path, "--parallel.megatron.fp8", "hybrid"), PROMPTS, [], 4).lines
    assert any("parallel.megatron (fp8) is not counted below" in line for line in lines)


def test_half_a_run_is_planned_without_the_other_half(model, tmp_path):
    replay = tmp_path / "replay.jsonl"
    replay.write_text("")
    train = resolve(config_8b(model("Qwen3-8B"), "--debug", "train-only", "--replay", str(replay)), PROMPTS, [], 4)
    huge = ["--checkpoint.every", "1", "--checkpoint.keep", "100000"]  # of which sampling writes none
    sample = resolve(config_8b(model("Qwen3-4B"), "--debug", "rollout-only", *huge), PROMPTS, [], 4)
    words = [{line.split(" ")[0] for line in plan.lines} for plan in (train, sample)]
    assert "memory" in words[0] and "rollouts" not in words[0]
    assert "memory" not in words[1] and "rollouts" in words[1] and not sample.refusals


@pytest.mark.parametrize(
    ("choice", "dtype", "wanted"),
    [("auto", "bfloat16", True), ("auto", "float32", False), ("always", "float32", True), ("never", "bfloat16", False)],
)
def test_transformer_engine_is_for_bf16_unless_demanded(choice, dtype, wanted):
    config = Config(
        model=ModelConfig("m", dtype), data=DataConfig(train="t"), parallel=ParallelConfig(transformer_engine=choice)
    )
    assert placement(config, gpu_memory=80 << 30).transformer_engine is wanted


@pytest.mark.parametrize("damage", ["fp8", "shard", "fused", "none"])
def test_the_plan_reads_the_headers_of_the_weights(damage, tmp_path):
    """FP8, a shard that has not been copied, and fused experts passed the dry run, and training refused them."""
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(ROOT / "examples/tiny/model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    words = {"fp8": "F8_E4M3", "shard": "the shard", "fused": "unknown", "none": ""}[damage]
    if damage == "fp8":
        save_file({k: v.to(torch.float8_e4m3fn) for k, v in weights.items()}, model / "model.safetensors")
    elif damage == "shard":
        (model / "model.safetensors").unlink()
        index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    elif damage == "fused":
        save_file(weights | {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 4)}, model / "model.safetensors")
    plan, config = Plan(), Config(ModelConfig(str(model)), DataConfig(train="d"))
    _add_weights(plan, config)
    assert (words in "".join(plan.refusals)) if words else not plan.refusals
    assert ("of float32 in 1 file" in "\n".join(plan.lines)) == (damage == "none")
