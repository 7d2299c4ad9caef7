"""Sample responses of a model and write a scored dump for each context of its teacher, batch by batch.

output/rollouts/step_NNNNNN.jsonl holds the responses of a batch, output/CONTEXT/scores/step_NNNNNN.jsonl their scores:
the files of a training run, so that its readers and its token page read them. A file that exists is not made again, so
an interrupted command goes on where it stopped; a batch draws from a seed of its own.
"""

import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.mechanism.contexts import TeacherContexts
from benchmarks.mechanism.scoring import sample, score_all
from megatron_egrsd.config import Config
from megatron_egrsd.data.dump_files import dump_path
from megatron_egrsd.data.problems import problem_indices
from megatron_egrsd.data.samples import Problem, Rollout, load_rollouts, save_rollouts
from megatron_egrsd.data.stopping import stop_token_ids
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.objectives.interface import rollout_advantages
from megatron_egrsd.objectives.load import load_objective
from megatron_egrsd.objectives.signal import History
from megatron_egrsd.preparation.readers import read_problems
from megatron_egrsd.report.scored_dump import save_scores, scored_rollouts
from megatron_egrsd.rewards.reward import decode_and_grade, load_reward
from megatron_egrsd.system.files import write_text

_MATTERS = ("model", "data", "objective", "rollout")  # sections of the configuration that the files follow from
_CALCULATION = re.compile(r"<<.*?>>")  # GSM8K's notes for a calculator, within its solutions


def read(files: list[str]) -> list[Problem]:
    """Read the problems of `files`, in every form that prepare-data reads, without GSM8K's <<2*3=6>>.

    Raises BadArgument for a problem without an answer or a solution, and for two with one id.
    """
    problems = [problem for file in files for problem in read_problems(file)]
    seen = set()
    for problem in problems:
        if not (problem.problem and problem.answer and problem.solution):
            raise BadArgument(f"problem {problem.id} lacks a text, an answer or a solution; remove it")
        if problem.id in seen:
            raise BadArgument(f"two problems have the id {problem.id!r}; make the ids unique")
        seen.add(problem.id)
    return [replace(problem, solution=_CALCULATION.sub("", problem.solution)) for problem in problems]


class Study:
    """A model, its teacher's contexts, and the problems in the order in which they are put to it."""

    def __init__(self, config: Config, contexts: tuple[str, ...], problems: list[Problem]):
        path = config.model.path
        disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.model.dtype)).eval()
        except (OSError, ValueError) as error:
            raise BadArgument(f"{path} is no model that transformers loads: {' '.join(str(error).split())}") from None
        self.config = config
        self.contexts = TeacherContexts(self.tokenizer, config, self.model.config.max_position_embeddings, contexts)
        self.stop = stop_token_ids(self.tokenizer, config.data, config.rollout.stop_tokens)
        self.reward = load_reward(config.data.reward, config.data.reward_timeout)
        fitting = [problem for problem in problems if self.contexts.fits(problem)]
        self.problems = [fitting[i] for i in problem_indices(len(fitting), 0, len(fitting), config.seed)]
        following = [*self.problems[1:], *self.problems[:1]]
        self.others = {problem.id: other for problem, other in zip(self.problems, following, strict=True)}

    def batch(self, step: int) -> list[Problem]:
        """Return the problems of a step, counted from 1. Raises BadArgument if there are not enough of them."""
        size = self.config.rollout.prompts_per_step
        if len(self.problems) < max(step * size, 2):
            raise BadArgument(f"{step} batches of {size} problems are asked for, and {len(self.problems)} problems fit")
        return self.problems[(step - 1) * size : step * size]

    def write(self, step: int, output: Path) -> None:
        """Write the files of a batch that are missing."""
        path, student = dump_path(output / "rollouts", step), None
        if not path.exists():
            rollouts, student = self._sampled(step)
            save_rollouts(rollouts, path)
        rollouts = load_rollouts(path)
        prompts = {
            target: found
            for context in self.contexts.names
            if not (target := dump_path(output / context / "scores", step)).exists()
            and any(found := self.contexts.prompts(context, rollouts, self.others))
        }
        if not prompts:
            return
        student = student or self._scores([r.prompt.student_ids for r in rollouts], rollouts)
        objective, history = self.config.objective, History()
        shaped, signal = rollout_advantages(
            rollouts, load_objective(objective, history), self.config.rollout.max_response_tokens
        )
        about = {"step": step, "vocab_size": self.model.config.vocab_size, "history": history}
        for target, found in prompts.items():
            places = [place for place, prompt in enumerate(found) if prompt]
            read, mine, rewards, signs = ([column[i] for i in places] for column in (found, rollouts, shaped, signal))
            own, teacher = dict(enumerate(student[i] for i in places)), self._scores(read, mine)
            save_scores(scored_rollouts(mine, rewards, signs, own, teacher, objective, self.tokenizer, **about), target)

    def _sampled(self, step: int) -> tuple[list[Rollout], dict[int, np.ndarray]]:
        """Sample and grade the responses of a batch; returns the student's scores of them too."""
        each = self.config.rollout.rollouts_per_prompt
        torch.manual_seed(1_000_003 * self.config.seed + step)
        prompts = [self.contexts.template.build(problem) for problem in self.batch(step) for _ in range(each)]
        responses = sample(self.model, [prompt.student_ids for prompt in prompts], self.stop, self.config.rollout)
        rollouts = []
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            reason = "stop" if response[-1] in self.stop else "length"
            answer, opened = prompt.problem.answer, self.contexts.template.opened
            graded = decode_and_grade(self.tokenizer, response, answer, reason, self.reward, opened)
            rollouts.append(Rollout(prompt, place // each, response, [], reason, 0, *graded))
        student = self._scores([prompt.student_ids for prompt in prompts], rollouts)
        return [replace(r, rollout_log_probs=student[i][0].tolist()) for i, r in enumerate(rollouts)], student

    def _scores(self, prompts: list[list[int]], rollouts: list[Rollout]) -> dict[int, np.ndarray]:
        responses = [rollout.response_ids for rollout in rollouts]
        return score_all(self.model, prompts, responses, self.config.score_temperature)


def write_dumps(study: Study, batches: int, files: list[str], output: Path) -> None:
    """Write the files of the first batches. BadArgument if `output` holds those of other settings."""
    config = {name: asdict(getattr(study.config, name)) for name in _MATTERS} | {"seed": study.config.seed}
    settings = json.loads(json.dumps({"problems": files, "config": config}))
    path = output / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(settings, indent=1))
    elif json.loads(path.read_text(encoding="utf-8")) != settings:
        raise BadArgument(f"{output} holds responses of other settings ({path.name}); give another --output")
    study.batch(batches)  # are there enough problems?
    start = time.monotonic()
    for step in range(1, batches + 1):
        study.write(step, output)
        print(f"batch {step} of {batches}: {time.monotonic() - start:.0f} s", flush=True)
