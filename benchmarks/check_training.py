"""Train on one device and report what only a run shows: log-probs against fp32, memory against the plan, speed.

    python -m benchmarks.check_training                      # the tiny model, and one of 20M parameters
    python -m benchmarks.check_training --models tiny 0.6B   # on a GPU: 0.6B has Qwen3-0.6B's sizes and random weights

No SGLang: responses are random tokens, and Hugging Face's fp32 log-probs stand where SGLang's would. The difference is
what training calls sync/log_prob_difference. Memory is counted by torch's allocator, on a GPU alone; `predicted` is the
dry run's sum without its allowance for the CUDA runtime, beside which stands what that really took. Seconds stand
beside those of the step-time model (planning/step_time.py), for a GPU that planning/machines.py knows. Ends with status
1 if log-probs or memory are further off than LIMITS and PEAK. tools/gpu/training.py runs it in more settings.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_egrsd.config import Config, DataConfig, ModelConfig, ObjectiveConfig, ParallelConfig, RolloutConfig
from megatron_egrsd.config.lora import LoraConfig
from megatron_egrsd.data.packing import schedule
from megatron_egrsd.data.samples import Problem, Prompt, Rollout
from megatron_egrsd.engine.build import build_engine
from megatron_egrsd.hf.adapter_file import configured_spec
from megatron_egrsd.hf.adapters import trained_parameters
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.learn import learn
from megatron_egrsd.planning.fit import memory_of_stages, placement
from megatron_egrsd.planning.machines import machine_of
from megatron_egrsd.planning.plan import readable
from megatron_egrsd.planning.step_time import pass_seconds, update_seconds

TINY = Path(__file__).parents[1] / "examples" / "tiny" / "model"
# name -> (sizes, longest response, tokens of a micro-batch)
MODELS = {
    "tiny": (None, 200, 2048),
    "20M": ({"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
             "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8192}, 300, 2048),
    "0.6B": ({"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
              "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}, 4000, 16384),
}  # fmt: skip
PROMPTS, PER_PROMPT, STEPS = 4, 4, 3
# Mean difference to fp32 log-probs before any update, in nats; share by which the peak may miss the plan.
LIMITS, PEAK = {"float32": 1e-4, "bfloat16": 0.05}, 0.1


@dataclass(frozen=True)
class Result:
    """Result of one model on this device.

    `differences` are mean |log-prob - fp32 log-prob| in nats of each step, the first before any update. `seconds` is
    the median step; `planned` is that of the step-time model, 0 for a device that it does not know.
    """

    model: str
    dtype: str
    parameters: int
    tokens: int
    differences: list[float]
    seconds: float
    peak: int = 0
    predicted: int = 0
    runtime: int = 0
    planned: float = 0.0

    def complaint(self) -> str:
        """Return a sentence about the first value outside its limit, or "" if there is none."""
        if not self.differences[0] < LIMITS[self.dtype]:
            return f"log-probs differ from fp32's by {self.differences[0]:.1e} nats"
        # cuBLAS's workspace is larger than the tiny model
        if self.model != "tiny" and self.peak and abs(self.peak / self.predicted - 1) > PEAK:
            return f"{readable(self.peak)} at the peak, but {readable(self.predicted)} predicted"
        return ""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_model(name: str, directory: Path) -> Path:
    """Return the model's checkpoint: the trained tiny one, or random weights as Hugging Face initialises them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes, path = MODELS[name][0], directory / name
    if sizes is None:
        return TINY
    if not path.exists():
        torch.manual_seed(0)
        config = Qwen3Config(**sizes, max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=2)
        with device():
            Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def make_rollouts(arch: Architecture, longest: int) -> list[Rollout]:
    """Draw random prompts and responses of 1/8 to all of `longest` tokens; half of each group is right."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(3, arch.vocab_size, (length,), generator=generator).tolist()

    rollouts = []
    for group in range(PROMPTS):
        prompt = Prompt(Problem(str(group), "p", "a", "s"), ids(10, 40), ids(40, 120))
        for i in range(PER_PROMPT):
            response = ids(longest // 8, longest)
            rollouts.append(Rollout(prompt, group, response, [0.0] * len(response), "stop", 0, reward=float(i % 2)))
    return rollouts


@torch.no_grad()
def with_reference(rollouts: list[Rollout], model: Path) -> list[Rollout]:
    """Return `rollouts` with Hugging Face's log-probs, computed in fp32 from the same weights."""
    from transformers import Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    torch.backends.cuda.matmul.allow_tf32 = False
    disable_progress_bar()
    network = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32).to(device()).eval()
    done = []
    for r in rollouts:
        ids = torch.tensor([r.prompt.student_ids + r.response_ids], device=device())
        logits = network(ids, logits_to_keep=len(r.response_ids) + 1).logits[0, :-1]
        log_probs = logits.log_softmax(-1).gather(1, ids[0, -len(r.response_ids) :, None])[:, 0]
        done.append(replace(r, rollout_log_probs=log_probs.tolist()))
    return done


def check(
    name: str, dtype: str, directory: Path, parallel: ParallelConfig | None = None, lora: LoraConfig | None = None
) -> Result:
    """Train `name` for some steps on this device, by default all weights with the layers that a run would choose."""
    model = make_model(name, directory)
    arch = Architecture.from_pretrained(model)
    _, longest, budget = MODELS[name]
    on_gpu = device().type == "cuda"
    rollouts = with_reference(make_rollouts(arch, longest), model)
    config = Config(
        model=ModelConfig(str(model), dtype),
        data=DataConfig(train="unused"),
        objective=ObjectiveConfig(importance_cap=2.0),
        rollout=RolloutConfig(prompts_per_step=PROMPTS, rollouts_per_prompt=PER_PROMPT),
        parallel=replace(parallel or ParallelConfig(), max_tokens_per_microbatch=budget),
        lora=lora or LoraConfig(),
        steps=STEPS,
        max_log_prob_difference=10.0,  # reported, not refused
    )
    gc.collect()
    differences, seconds = [], []
    with build_engine(config, needs_teacher=True) as engine:
        for _ in range(STEPS):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            metrics, _ = learn(engine, rollouts, config)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            differences.append(metrics["sync/log_prob_difference"])
        peak = runtime = 0
        if on_gpu:
            free, total = torch.cuda.mem_get_info()
            peak, runtime = torch.cuda.max_memory_allocated(), total - free - torch.cuda.memory_reserved()
    lengths = [len(r.prompt.student_ids) + len(r.response_ids) for r in rollouts]
    tokens = max(sum(lengths[i] for i in part) for part in schedule([lengths], budget, 1)[0])
    place = placement(config, None)
    (memory,) = memory_of_stages(config, arch, 1, place, tokens)
    predicted = memory.total - memory.resident.get("CUDA runtime", 0)
    # The first step builds and warms up.
    return Result(name, dtype, arch.num_parameters, sum(lengths), differences, statistics.median(seconds[1:]), peak,
                  predicted, runtime, planned_seconds(config, arch, rollouts))  # fmt: skip


def planned_seconds(config: Config, arch: Architecture, rollouts: list[Rollout]) -> float:
    """Return the seconds of a step by the step-time model: the teacher's scores, and the update on all `rollouts`."""
    machine = machine_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if machine is None:
        return 0.0
    responses = [len(r.response_ids) for r in rollouts]
    teachers = [len(r.prompt.teacher_ids) + n for r, n in zip(rollouts, responses, strict=True)]
    students = [len(r.prompt.student_ids) + n for r, n in zip(rollouts, responses, strict=True)]
    spec, rows = configured_spec(config.lora), sum(responses)
    trained = trained_parameters(arch, spec)
    return (
        pass_seconds(machine, arch, config.parallel, 1, teachers, rows, train=False, lora=spec)
        + pass_seconds(machine, arch, config.parallel, 1, students, rows, train=True, lora=spec)
        + update_seconds(machine, config.parallel, 1, trained)
    )


def table(results: list[Result]) -> str:
    rows = [
        "| model | parameters | type | difference of log-probs, before and after updates (nats) | tokens/s "
        "| seconds a step | planned | peak | predicted | off | CUDA runtime |",
        "|---|--:|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results:
        memory = (
            f"{readable(r.peak)} | {readable(r.predicted)} | {r.peak / r.predicted - 1:+.1%} | {readable(r.runtime)}"
        )
        rows.append(
            f"| {r.model} | {r.parameters / 1e6:,.1f}M | {r.dtype} | {', '.join(f'{d:.1e}' for d in r.differences)} "
            f"| {r.tokens / r.seconds:,.0f} | {r.seconds:.2f} | {f'{r.planned:.2f}' if r.planned else '-'} "
            f"| {memory if r.peak else '- | - | - | -'} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tiny", "20M"])
    arguments = parser.parse_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with tempfile.TemporaryDirectory() as scratch:
        results = [check(m, dtype, Path(scratch)) for m in arguments.models for dtype in ("float32", "bfloat16")]
    print(f"{where}, torch {torch.__version__}, {STEPS} steps\n\n{table(results)}\n")
    complaints = [f"{r.model} in {r.dtype}: {r.complaint()}" for r in results if r.complaint()]
    for complaint in complaints:
        print(f"error: {complaint}", file=sys.stderr)
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
