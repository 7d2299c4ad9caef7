"""Accuracy, pass@k, majority@k and lengths of a checkpoint on sets of problems.

Every sample is written to output/samples.jsonl as soon as it is graded; the same command resumes from there. With
evaluation.benchmarks.deterministic a sample depends only on its problem, its index and the seed, so an interrupted
evaluation gives the same table as one without interruption.
"""

import hashlib
import json
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_egrsd.config import Config
from megatron_egrsd.data.benchmarks import ProblemSet, load_sets
from megatron_egrsd.data.prompt_builder import PromptBuilder, prompt_builder
from megatron_egrsd.data.prompts import tell_left_out, usable
from megatron_egrsd.data.samples import Problem, Prompt, is_right
from megatron_egrsd.data.stopping import stop_token_ids
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.evaluation.evaluated_model import digest, hugging_face
from megatron_egrsd.evaluation.protocol import overridden, published_models, samples_per_problem
from megatron_egrsd.evaluation.sample_file import SampleFile
from megatron_egrsd.evaluation.summary import Estimate, GradedResponse, summarize
from megatron_egrsd.evaluation.table import TABLE_WIDTH, deviations, evaluation_table, paper_summary, paper_table
from megatron_egrsd.rewards.answers import final_answer, states_answer
from megatron_egrsd.rewards.normal_form import normalize
from megatron_egrsd.rewards.reward import WORKERS, Reward, decode_and_grade, load_reward
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.deterministic import check_deterministic, deterministic
from megatron_egrsd.rollout.generation import Generation
from megatron_egrsd.rollout.servers import RolloutServers, retry_lost
from megatron_egrsd.system.files import check_outside, locked, write_text
from megatron_egrsd.system.interrupts import held_back

Results = dict[str, dict[str, Estimate]]  # set name -> number's name -> estimate


def evaluate(config: Config) -> Results:
    """Sample the responses missing in output/samples.jsonl, write output/results.json and print the table.

    `model.path` is a Hugging Face or a Megatron checkpoint, `lora.init` an adapter of it or "". Raises BadArgument
    before anything is started.
    """
    _check_output(config)
    sets = load_sets(config.evaluation.benchmarks, config.data)
    reward = load_reward(config.data.reward, config.data.reward_timeout)
    output, unlike, settings = Path(config.output), overridden(config), _settings(config)
    if unlike:
        print(deviations(unlike), flush=True)
    path = output / "samples.jsonl"
    if path.exists():  # refuse samples of other settings now: the model may take minutes to convert
        SampleFile(path, settings).close()
    with locked(output), hugging_face(config) as model, SampleFile(path, settings) as file:
        run = Evaluation(config, sets, prompt_builder(config, model), reward, file)
        run.check_file()
        if run.missing():
            run.sample(replace(config.model, path=model))
    results = {s.name: summarize(run.samples(s), config.seed) for s in run.sets}
    _write_results(config, run, results, settings, unlike)
    evaluated = " + ".join(filter(None, (config.model.path, config.lora.init)))
    title = f"{evaluated}, T {config.evaluation.temperature:g}, {config.rollout.max_response_tokens} tokens"
    console = Console(soft_wrap=True, highlight=False)
    console.print(evaluation_table(title, results))
    if config.evaluation.protocol:
        console.width = max(console.width, TABLE_WIDTH)
        console.print(paper_table(results, published_models(config.model.path), unlike))
    if failures := [row for row in run.file.rows.values() if row["error"]]:
        print(f"the reward failed on {len(failures)} responses, which count as 0; first: {failures[0]['error']}")
    print(f"samples {run.file.path}   results {output / 'results.json'}")
    return results


class Evaluation:
    """An evaluation: the sets, their prompts, and the existing samples."""

    def __init__(
        self, config: Config, sets: list[ProblemSet], builder: PromptBuilder, reward: Reward, file: SampleFile
    ):
        self.config, self.builder, self.reward, self.file = config, builder, reward, file
        self.k = {s.name: samples_per_problem(config.evaluation, s.name) for s in sets}
        self.sets: list[ProblemSet] = []
        self.prompts: list[Prompt] = []
        for s in sets:
            built = usable(s.problems, self._prompt, s.bad)
            tell_left_out(s.source, len(built), s.bad)
            self.sets.append(replace(s, problems=[problem for problem, _ in built]))
            self.prompts += [prompt for _, prompt in built]
        self.problems = [(s.name, problem) for s in self.sets for problem in s.problems]
        ids = builder.tokenizer.convert_tokens_to_ids("</think>")
        self.end_of_thinking = None if ids == builder.tokenizer.unk_token_id else ids
        self.opened = builder.opened

    def _prompt(self, problem: Problem) -> tuple[Problem, Prompt]:
        """Return a problem and its prompt, which ends in evaluation.benchmarks.instruction. Raises BadRow."""
        instruction = self.config.evaluation.benchmarks.instruction
        asked = replace(problem, problem=f"{problem.problem}\n{instruction}") if instruction else problem
        return problem, self.builder.build(asked, privileged=False)

    def check_file(self) -> None:
        """Raise BadArgument if the file holds samples of a problem that has changed since then."""
        now = {(name, p.id): _digest(p.problem, p.answer) for name, p in self.problems}
        for (name, problem, _), row in self.file.rows.items():
            if row["problem"] != now.get((name, problem), row["problem"]):
                raise BadArgument(
                    f"{self.file.path} holds samples of another problem {problem} of {name}; choose another output"
                )

    def missing(self) -> int:
        """Return the number of samples that are still to be drawn."""
        return sum((name, p.id, j) not in self.file.rows for name, p in self.problems for j in range(self.k[name]))

    def sample(self, model) -> None:
        """Draw, grade and write the missing samples."""
        config, evaluation = self.config, self.config.evaluation
        total, most = sum(self.k[name] for name, _ in self.problems), max(self.k.values())
        missing = self.missing()
        # Samples that the client need not draw: those in the file, and those beyond the k of their set.
        done: dict[tuple[int, int], Any] = {
            (i, j): None
            for i, (name, p) in enumerate(self.problems)
            for j in range(most)
            if (name, p.id, j) in self.file.rows or j >= self.k[name]
        }
        seeded = evaluation.benchmarks.deterministic
        settings = deterministic(config.rollout.servers) if seeded else config.rollout.servers
        logs = Path(config.output) / "logs"
        source = ", ".join(settings.urls) or f"{settings.engines} SGLang server(s), log in {logs}"
        print(f"{missing} of {total} samples to draw; {source}", flush=True)
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("samples"), TimeRemainingColumn()
        with (
            RolloutServers(settings, model, config.seed, logs) as servers,
            Progress(*columns, disable=not os.isatty(1)) as progress,
            ThreadPoolExecutor(WORKERS) as graders,
        ):
            if seeded:
                check_deterministic(servers)
            stop = stop_token_ids(self.builder.tokenizer, config.data, config.rollout.stop_tokens)
            client = RolloutClient(servers, config.rollout, stop)
            task = progress.add_task("", total=total, completed=total - missing)

            gradings: deque[Future] = deque()
            writing = threading.Lock()

            def grade_and_write(i: int, j: int, generation: Generation) -> None:
                row = self._row(i, j, generation)
                with writing:
                    self.file.append(row)
                progress.advance(task)

            def finished(i: int, j: int, generation: Generation) -> None:
                done[i, j] = None  # the file holds the response
                with held_back():
                    while gradings and gradings[0].done():
                        gradings.popleft().result()
                    gradings.append(graders.submit(grade_and_write, i, j, generation))

            def generate() -> None:
                client.generate(
                    [p.student_ids for p in self.prompts],
                    most,
                    settings=evaluation,
                    done=done,
                    finished=finished,
                    seeds=self._seed if seeded else None,
                )

            retry_lost(generate, lambda _: servers.bring_back())
            for grading in gradings:
                grading.result()

    def samples(self, problem_set: ProblemSet) -> list[GradedResponse]:
        """Return the first k samples of every problem of a set, in the set's order."""
        k = self.k[problem_set.name]
        rows = [self.file.rows[problem_set.name, p.id, j] for p in problem_set.problems for j in range(k)]
        return [
            GradedResponse(
                problem=row["id"],
                right=is_right(row["reward"]),
                length=row["tokens"],
                truncated=row["finish_reason"] == "length",
                thinking=row["thinking_tokens"],
                states_answer=row["states_answer"],
                vote=row["vote"],
            )
            for row in rows
        ]

    def _seed(self, i: int, j: int) -> int:
        name, problem = self.problems[i]
        return int(_digest(str(self.config.seed), name, problem.id, str(j))[:15], 16)  # 60 bits; SGLang accepts 63

    def _row(self, i: int, j: int, generation: Generation) -> dict[str, Any]:
        (name, problem), ids, reason = self.problems[i], generation.response_ids, generation.finish_reason
        text, reward, error = decode_and_grade(
            self.builder.tokenizer, ids, problem.answer, reason, self.reward, self.opened
        )
        truncated = reason == "length"
        readings = [] if truncated else final_answer(self.opened + text)
        return {
            "set": name,
            "id": problem.id,
            "index": j,
            "problem": _digest(problem.problem, problem.answer),
            "answer": problem.answer,
            "reward": reward,
            "error": error,
            "finish_reason": reason,
            "tokens": len(ids),
            "thinking_tokens": self._thinking(ids, text),
            "states_answer": not truncated and states_answer(self.opened + text),
            "vote": normalize(readings[0][:400]) if readings else "",
            "response": text,
        }

    def _thinking(self, ids: list[int], text: str) -> int:
        """Count the tokens up to and with the last </think>; all if the thinking never ends, 0 without thinking."""
        if "</think>" not in text:
            return len(ids) if self.opened or "<think>" in text else 0
        if self.end_of_thinking in ids:
            return len(ids) - ids[::-1].index(self.end_of_thinking)
        thinking = text[: text.rindex("</think>") + len("</think>")]
        return min(len(ids), len(self.builder.tokenizer.encode(thinking, add_special_tokens=False)))


def _check_output(config: Config) -> None:
    """Raise BadArgument if the samples would count as files of the model, and the same command could not continue."""
    for key, path in (("model.path", config.model.path), ("lora.init", config.lora.init)):
        if path:
            check_outside(Path(config.output), "output", Path(path), key)


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings that determine a sample besides its problem."""
    e, d = config.evaluation, config.data
    return {
        "model": digest(Path(config.model.path)),
        **({"lora.init": digest(Path(config.lora.init))} if config.lora.init else {}),
        "model.dtype": config.model.dtype,
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        **{f"evaluation.{key}": getattr(e, key) for key in ("temperature", "top_p", "top_k")},
        "evaluation.instruction": e.benchmarks.instruction,
        "evaluation.deterministic": e.benchmarks.deterministic,
        "data.student_template": d.student_template,
        **({"rollout.stop_tokens": config.rollout.stop_tokens} if config.rollout.stop_tokens else {}),
        **{f"data.{key}": getattr(d, key) for key in ("system_prompt", "enable_thinking", "reward")},
        "seed": config.seed,
    }


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest()[:16]


def _write_results(
    config: Config, run: Evaluation, results: Results, settings: dict[str, Any], unlike: dict[str, tuple]
) -> None:
    content: dict[str, Any] = {
        "model": config.model.path,
        **({"adapter": config.lora.init} if config.lora.init else {}),
        "settings": settings,
        "sets": {
            s.name: {"source": s.source, "problems": len(s.problems), "k": run.k[s.name]}
            | {key: {k: v for k, v in asdict(e).items() if v is not None} for key, e in results[s.name].items()}
            for s in run.sets
        },
    }
    if protocol := config.evaluation.protocol:
        summary = dict(zip(("avg", "avg_len", "eff"), paper_summary(results), strict=True))
        own = {key: value for key, (value, _) in unlike.items()}
        content["protocol"] = {"name": protocol, "overridden": own, **summary}
    write_text(Path(config.output) / "results.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
