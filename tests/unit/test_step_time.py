"""The step times of `megatron-egrsd plan`: operations against torch's count, the clock against a simulation."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import step_time as fitted
from megatron_egrsd.config import ParallelConfig, SyncConfig, TeacherConfig
from megatron_egrsd.config.lora import ATTENTION, TARGETS
from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.samples import Problem, Prompt, Rollout, save_rollouts
from megatron_egrsd.hf import operations
from megatron_egrsd.hf.adapters import AdapterSpec
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.planning import cluster, step_time
from megatron_egrsd.planning.activations import Placement
from megatron_egrsd.planning.machines import MACHINES, Machine
from megatron_egrsd.planning.memory import rank_memory
from tests.command_line import run_command
from tests.published import PARAMETERS, PUBLISHED

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-4B"])
@pytest.mark.heavy
def test_operations_are_those_that_torch_counts(name):
    """Run transformers' model on the meta device; torch counts the masked half of the scores too."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen3Config, Qwen3ForCausalLM

    fields = {k: v for k, v in PUBLISHED[name].items() if k not in ("architectures", "model_type", "torch_dtype")}
    tokens = 1024
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**fields))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, tokens, dtype=torch.int64))
    arch = Architecture.from_config(PUBLISHED[name])
    masked = 2.0 * arch.num_layers * arch.num_heads * arch.head_dim * tokens**2
    counted = counter.get_total_flops()
    assert operations.forward_flops(arch, [tokens]) + operations.head_flops(arch, tokens) + masked == pytest.approx(
        counted, rel=2e-3
    )


@pytest.mark.heavy
def test_operations_of_training_adapters_are_those_that_torch_counts_for_peft():
    """Frozen weights without gradients, on the meta device; short, so that attention hardly counts."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen3Config, Qwen3ForCausalLM

    fields = {k: v for k, v in PUBLISHED["Qwen3-8B"].items() if k not in ("architectures", "model_type", "torch_dtype")}
    tokens, spec = 256, AdapterSpec(64, 128, TARGETS)
    with torch.device("meta"):
        model = get_peft_model(Qwen3ForCausalLM(Qwen3Config(**fields)), LoraConfig(r=64, target_modules=list(TARGETS)))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.int64)).logits.sum().backward()
    arch = Architecture.from_config(PUBLISHED["Qwen3-8B"])
    ours = operations.needed_training_flops(arch, [tokens], tokens, spec)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)
    whole = operations.needed_training_flops(arch, [tokens], tokens)
    assert ours < 0.7 * whole


def test_a_mixture_computes_with_the_experts_it_chooses():
    arch = Architecture.from_config(PUBLISHED["Qwen3-30B-A3B"])
    used, every = operations.layer_parameters(arch)
    embeddings = 2 * arch.vocab_size * arch.hidden_size
    assert every + embeddings == PARAMETERS["Qwen3-30B-A3B"]
    assert used + embeddings == pytest.approx(3.3e9, rel=0.02)  # A3B: 3.3 billion active, says the model card


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 5))
def test_generation_is_simulated_step_by_step(responses, slots, prompt):
    def step(running: int, context: float) -> float:
        return 1.0 + 0.1 * running + 0.01 * running * context

    waiting, running, seconds = list(responses), [], 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            running.append([waiting.pop(0), 0])
        # The middle of the step: as long as a context grows linearly, the mean over steps.
        seconds += step(len(running), prompt + sum(done + 0.5 for _, done in running) / len(running))
        running = [[length, done + 1] for length, done in running if done + 1 < length]
    assert step_time.generate_seconds(step, responses, prompt, slots) == pytest.approx(seconds)


def test_one_step_off_hides_the_shorter_of_sampling_and_training():
    generate, train = torch.tensor([5.0, 1.0]).numpy(), torch.tensor([2.0, 2.0]).numpy()
    assert step_time.step_seconds(generate, 0.5, train, 0.25, staleness=0).tolist() == [7.75, 3.75]
    assert step_time.step_seconds(generate, 0.5, train, 0.25, staleness=1).tolist() == [5.25, 2.75]
    # On one shared processor nothing is gained; in between, the overlapping part takes that much longer.
    assert step_time.step_seconds(generate, 0.5, train, 0.25, staleness=1, slowdown=(2, 2)).tolist() == [7.75, 3.75]
    assert step_time.step_seconds(generate, 0.5, train, 0.25, staleness=1, slowdown=(1.5, 1.5)).tolist() == [6.5, 3.25]
    # 2.5 s of training during which sampling does 1.25 of its 5 s; 1 s of sampling, which then waits for the training.
    assert step_time.step_seconds(generate, 0.5, train, 0.25, staleness=1, slowdown=(2, 1)).tolist() == [6.5, 2.75]


def test_experts_are_not_divided_over_more_ranks_than_divide_them():
    few = PUBLISHED["Qwen3-30B-A3B"] | {"num_experts": 12}
    arch, machine = Architecture.from_config(few), MACHINES["H200"]
    layouts = list(cluster._layouts(arch, machine, 16, 256, 4096))
    assert {p.expert for p in layouts} == {1, 2, 4}
    for parallel in layouts:
        arch.check_parallel(parallel)


@pytest.mark.heavy
def test_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_command("plan", "--models", "Qwen3-8B", "Qwen3-32B", "--gpus", "8")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| Qwen3")]
    assert len(rows) == 4 and all(row.count("|") == 16 for row in rows)
    assert "does not fit" in rows[1] and "does not fit" not in rows[0]  # 8 H100 hold 8B, not 32B and its servers
    done = run_command("plan", "--models", "no/model", "--gpus", "8")
    assert done.returncode == 2 and "no/model does not exist" in done.stderr and done.stderr.count("\n") == 1


def test_the_choice_fits_and_is_the_fastest():
    arch, machine = Architecture.from_config(PUBLISHED["Qwen3-8B"]), MACHINES["H100"]
    batch = step_time.Batch(300, 1500, cluster.long_tailed(256, 16384))
    choices = [c for n in range(1, 8) for c in cluster._choices(arch, machine, 8 - n, n, batch)]
    best = cluster.best(arch, machine, 8, batch)
    assert best.step == min(c.step for c in choices)
    for c in choices:
        assert c.memory <= 0.95 * machine.memory and c.serving + c.training == 8
        assert 256 % (c.training // c.parallel.model_parallel) == 0
        assert c.one_step_off <= c.step


def test_stages_may_differ_where_their_number_does_not_divide_the_layers():
    arch, machine = Architecture.from_config(PUBLISHED["Qwen3-235B-A22B"]), MACHINES["H200"]
    layouts = list(cluster._layouts(arch, machine, 256, 4096, 17884))
    for parallel in layouts:
        arch.check_parallel(parallel)
    assert {parallel.pipeline for parallel in layouts} >= {1, 2, 4, 8, 16}  # 94 layers
    lora = AdapterSpec(8, 16, ATTENTION)
    bucket, place = SyncConfig().bucket_mib << 20, Placement(gpu=True, transformer_engine=True)
    of_rank = {"tokens": 4096, "itemsize": 2, "bucket_bytes": bucket, "teacher": TeacherConfig()}
    for parallel, spec in itertools.product(layouts[::97], (None, lora)):
        parallel = dataclasses.replace(parallel, max_tokens_per_microbatch=4096)
        every = (rank_memory(arch, parallel, 256, n, place, **of_rank, lora=spec) for n in range(parallel.pipeline))
        assert cluster._memory(arch, parallel, 256, spec).total == max(memory.total for memory in every)


def test_turns_use_every_gpu_twice_and_pay_for_the_moves():
    arch, machine = Architecture.from_config(PUBLISHED["Qwen3-8B"]), MACHINES["H100"]
    batch = step_time.Batch(300, 1500, cluster.long_tailed(256, 16384))
    turns, apart = cluster.best_in_turns(arch, machine, 8, batch), cluster.best(arch, machine, 8, batch)
    assert turns.serving == turns.training == 8 and turns.generate < apart.generate and turns.train < apart.train
    weights = 2 * arch.num_parameters / (turns.parallel.tensor * turns.parallel.pipeline)
    adam = 12 * arch.num_parameters / 8  # over all ranks: the distributed optimizer
    assert turns.moves * machine.host == pytest.approx(2 * (2 * weights + adam), rel=0.01)  # and the frozen teacher
    assert turns.step == pytest.approx(turns.generate + turns.score + turns.train + turns.sync + turns.moves)


def test_context_parallel_ranks_send_their_keys_and_values_round():
    """On a machine that only its links slow down: bytes of each layer's ring, within and between nodes."""
    arch = Architecture.from_config(PUBLISHED["Qwen3-8B"])
    fast = dict.fromkeys(("flops", "memory_rate", "host"), 1e30)
    machine = Machine("links", 0, link=1e9, network=1e8, pass_seconds=0.0, **fast)
    chunk = 1000 * 2 * arch.num_kv_heads * arch.head_dim * 2  # keys and values of a rank's tokens, bf16
    for context, ranks, rate in ((1, 1, 1e9), (2, 4, 1e9), (8, 8, 1e9), (16, 16, 1e8)):
        parallel = ParallelConfig(context=context, max_tokens_per_microbatch=1000)
        lengths = [1000 * context] * (ranks // context)
        for train, rounds in ((False, 1), (True, 3)):
            seconds = step_time.pass_seconds(machine, arch, parallel, ranks, lengths, 0, train=train)
            assert seconds == pytest.approx(rounds * arch.num_layers * (context - 1) * chunk / rate)


def _run(path: Path, prompts: int, longest: int, seed: int) -> None:
    """Write a run whose phases took times given by constants: 3 ms a decoding step, 40 us a sequence, and so on."""
    config = parse_config(["--config", str(ROOT / "examples/configs/tiny_cpu.yaml"), "--model.path",
                           str(ROOT / "examples/tiny/model"), "--rollout.prompts_per_step", str(prompts)])  # fmt: skip
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    arch = Architecture.from_pretrained(config.model.path)
    generator = torch.Generator().manual_seed(seed)
    with (path / "metrics.jsonl").open("w") as metrics:
        for number in range(1, 9):
            rollouts = []
            for group in range(prompts):
                prompt = Prompt(Problem("p", "p", "a", "s"), [1] * 20, [1] * 40)
                for k in range(8):
                    n = int(torch.randint(5, longest, (1,), generator=generator))
                    rollouts.append(Rollout(prompt, group, [1] * n, [0.0] * n, "stop", 0, "", float(k % 2)))
            save_rollouts(rollouts, path / f"rollouts/step_{number:06d}.jsonl")
            terms = fitted._terms(rollouts, config, arch)
            constants = {"generate": (3e-3, 4e-5), "score": (1e-11, 0.02), "train": (2e-11, 0.05), "sync": (0.3,)}
            seconds = {f"time/{p}": sum(map(float.__mul__, map(float, terms[p]), c)) for p, c in constants.items()}
            disturbed = 3.0 if number == 4 else 1.0  # by other load
            metrics.write(json.dumps({"step": number} | {k: v * disturbed for k, v in seconds.items()}) + "\n")


def test_the_terms_of_a_step_by_hand():
    """The second of two groups is all right: it is sampled and scored, and not trained."""
    prompt = Prompt(Problem("p", "p", "a", "s"), [1] * 20, [1] * 40)
    given = [(0, 5, 1.0), (0, 10, 0.0), (1, 30, 1.0), (1, 40, 1.0)]
    rollouts = [Rollout(prompt, group, [1] * n, [0.0] * n, "stop", 0, "", reward) for group, n, reward in given]
    config = parse_config(["--config", str(ROOT / "examples/configs/tiny_cpu.yaml"), "--objective.preset", "grpo",
                           "--parallel.max_tokens_per_microbatch", "100",
                           "--rollout.servers.max_concurrent_requests", "2"])  # fmt: skip
    terms = fitted._terms(rollouts, config, Architecture.from_pretrained(ROOT / "examples/tiny/model"))
    # Two at a time: the third starts when the first ends, the last at the end of the second.
    assert terms["generate"] == [50, 85]
    layers, size = 4, 96  # of the hidden states, of all queries, and twice that of all keys
    weights = layers * (2 * size * size + 2 * size * 48 + 3 * size * 192 + 2 * size + 2 * 24) + size
    attention, head = 2 * layers * size, 2 * 45 * size
    squares = 45**2 + 50**2 + 70**2 + 80**2
    assert terms["score"] == [2 * weights * 245 + attention * squares + head * 85, 3]  # 80, 70, 50 + 45 tokens
    assert terms["train"] == [3 * (2 * weights * 55 + attention * (25**2 + 30**2) + head * 15), 1]
    assert terms["sync"] == [1]


def test_a_measured_step_trains_the_rollouts_that_the_loop_trains():
    """Without a signal: none, but with a KL penalty, or an objective that trains all, every one."""
    prompt = Prompt(Problem("p", "p", "a", "s"), [1] * 20, [1] * 40)
    rollouts = [Rollout(prompt, 0, [1] * 30, [0.0] * 30, "stop", 0, "", 1.0) for _ in range(2)]
    arch = Architecture.from_pretrained(ROOT / "examples/tiny/model")

    def trained(*words: str) -> bool:
        config = parse_config(["--config", str(ROOT / "examples/configs/tiny_cpu.yaml"), *words])
        return fitted._terms(rollouts, config, arch)["train"][0] > 0

    grpo = ("--objective.preset", "grpo")
    assert [trained(*grpo), trained(*grpo, "--objective.kl_coef", "0.01")] == [False, True]
    assert trained("--objective.preset", "antisd", "--data.teacher_context", "template")


def test_constants_of_one_run_predict_another(tmp_path, capsys):
    _run(tmp_path / "a", prompts=4, longest=200, seed=0)
    _run(tmp_path / "b", prompts=12, longest=100, seed=1)
    fitted.check([tmp_path / "a", tmp_path / "b"])
    out = capsys.readouterr().out
    assert "a decoding step 3.00 ms + 40 us a sequence; scoring 100.0 GFLOP/s + 20 ms a micro-batch" in out
    ratios = [line.split("|")[6].strip() for line in out.splitlines() if line.startswith("| b ")]
    assert ratios == ["1.00"] * 4
