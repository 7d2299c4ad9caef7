"""A training step with adapters beside one of all weights: seconds, and memory beside the plan's, in turn.

    python -m benchmarks.adapters [--layers 28] [--rank 64] [--rounds 5] [--tokens 64]
    python -m benchmarks.adapters --tokenizer /models/Qwen3-0.6B --problems tests/data/gsm8k_test.jsonl

Both train the paper's objective with its frozen teacher in fp32 on one CPU rank, each in a process of its own that
waits while the other steps. The model has Qwen3-0.6B's sizes but for its layers, and random weights; a step is four
responses of --tokens tokens to as many prompts, without SGLang. With a tokenizer the prompts are those of the first
four problems (keys "question" and "answer", as in GSM8K), and the responses the beginnings of their solutions.
"""

import argparse
import multiprocessing
import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from benchmarks.convert import make_model
from benchmarks.measure import Peak, load, own_memory, table
from megatron_egrsd.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig
from megatron_egrsd.config.lora import LoraConfig
from megatron_egrsd.data.samples import Problem, Prompt, Rollout

PROMPTS = 4


def made_up_rollouts(tokens: int) -> list[Rollout]:
    """Return one response to each prompt, two of them right; token ids of no meaning."""
    rollouts = []
    for group in range(PROMPTS):
        prompt = Prompt(Problem(str(group), "p", "a", "s"), list(range(3, 35)), list(range(3, 99)))
        response = [100 + group + 7 * i for i in range(tokens)]
        rollouts.append(made_up_rollout(prompt, group, response))
    return rollouts


def made_up_rollout(prompt: Prompt, group: int, response: list[int]) -> Rollout:
    return Rollout(prompt, group, response, [0.0] * len(response), "length", 0, reward=float(group % 2))


def read_rollouts(source: Path, tokenizer: str, tokens: int, config: Config) -> list[Rollout]:
    """Return the beginning of the solution as the response to each of the first problems; two of them right."""
    from transformers import AutoTokenizer

    from megatron_egrsd.data.problems import load_problems
    from megatron_egrsd.data.prompt_builder import PromptBuilder

    builder = PromptBuilder(AutoTokenizer.from_pretrained(tokenizer), config.data, tokens, 40_960)
    rollouts = []
    for group, problem in enumerate(load_problems(str(source), config.data)[:PROMPTS]):
        response = builder.response_ids(problem, problem.solution)[:tokens]
        rollouts.append(made_up_rollout(builder.build(problem), group, response))
    return rollouts


def planned(config: Config, rollouts: list[Rollout]) -> int:
    """Return the bytes that the dry run plans for `rollouts`, without the weight sync, which these steps lack."""
    from megatron_egrsd.hf.architecture import Architecture
    from megatron_egrsd.planning.fit import Longest, memory_of_longest, placement

    longest = Longest(
        max(len(r.prompt.student_ids) + len(r.response_ids) for r in rollouts),
        max(len(r.prompt.teacher_ids) + len(r.response_ids) for r in rollouts),
    )
    arch = Architecture.from_pretrained(config.model.path)
    (memory,) = memory_of_longest(config, arch, 1, placement(config, None), longest)
    phases = [sum(terms.values()) for phase, terms in memory.phases.items() if phase != "weight sync"]
    return sum(memory.resident.values()) + max(phases)


def config_of(model: Path, rank: int) -> Config:
    return Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(train="unused", problem_key="question", answer_key="answer", solution_key="answer"),
        rollout=RolloutConfig(prompts_per_step=PROMPTS, rollouts_per_prompt=1),
        parallel=ParallelConfig(max_tokens_per_microbatch=512),
        optimizer=OptimizerConfig(lr=5e-6),
        lora=LoraConfig(rank=rank),
        steps=100,
        max_log_prob_difference=1e9,  # the rollouts' log-probs are made up
    )


def train(pipe: Connection, config: Config, rollouts: list[Rollout]) -> None:
    """Take a step for every message; answer with its seconds of scoring and training, and the steps' peak in bytes.

    What the process holds before the model is built, mostly libraries, is not counted, nor are pages of files, of which
    the checkpoint is one: the kernel takes them back when memory is needed.
    """
    from megatron_egrsd.engine.build import build_engine
    from megatron_egrsd.learn import learn

    before = own_memory()
    with build_engine(config, needs_teacher=True) as engine:
        while pipe.recv():
            with Peak() as peak:
                metrics, _ = learn(engine, rollouts, config)
            assert metrics["optimizer/updates"] == 1, metrics
            pipe.send((metrics["time/score"], metrics["time/train"], peak.bytes - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of a response, at most")
    parser.add_argument("--tokenizer", help="directory of a tokenizer with a chat template")
    parser.add_argument("--problems", type=Path, help="problems for --tokenizer")
    arguments = parser.parse_args()
    if bool(arguments.tokenizer) != bool(arguments.problems):
        parser.error("--tokenizer and --problems go together")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    rows = {"all weights": 0, f"adapters of rank {arguments.rank}": arguments.rank}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        make_model(model, trainable=True, num_hidden_layers=arguments.layers)
        configs = {name: config_of(model, rank) for name, rank in rows.items()}
        if arguments.tokenizer:
            rollouts = read_rollouts(arguments.problems, arguments.tokenizer, arguments.tokens, configs["all weights"])
        else:
            rollouts = made_up_rollouts(arguments.tokens)
        plans = {name: planned(config, rollouts) for name, config in configs.items()}
        pipes, found = {}, {name: [] for name in rows}
        for name, config in configs.items():
            pipes[name], theirs = context.Pipe()
            context.Process(target=train, args=(theirs, config, rollouts), daemon=True).start()
        for turn in range(arguments.rounds + 1):
            for name, pipe in pipes.items():
                pipe.send(True)
                answer = pipe.recv()
                if turn:  # the first warms up
                    found[name].append(answer)
        for pipe in pipes.values():
            pipe.send(False)
    medians = {name: [median(column) for column in zip(*steps, strict=True)] for name, steps in found.items()}
    whole = medians["all weights"]
    lengths = [f"{len(r.prompt.student_ids)} + {len(r.response_ids)}" for r in rollouts]
    setting = f"{arguments.layers} layers, {arguments.rounds} rounds, {', '.join(lengths)} tokens"
    print(f"{setting} of prompt and response; {load()}\n")
    columns = ["", "score, s", "train, s", "beside all weights", "peak memory, GB", "beside all weights", "planned, GB"]
    lines = [
        [name, f"{score:.2f}", f"{step:.2f}", f"{(score + step) / (whole[0] + whole[1]):.2f}", f"{peak / 1e9:.1f}",
         f"{peak / whole[2]:.2f}", f"{plans[name] / 1e9:.1f}"]
        for name, (score, step, peak) in medians.items()
    ]  # fmt: skip
    print(table(columns, lines))


if __name__ == "__main__":
    main()
