"""The stages of the data: Problem -> Prompt -> Rollout (-> Sequence -> MicroBatch, data/packing.py)."""

import base64
import json
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.system.files import atomic


@dataclass(frozen=True)
class Problem:
    """One verifiable problem. `solution` is the privileged context; it is empty if the dataset has none."""

    id: str
    problem: str
    answer: str
    solution: str = ""
    teacher_turns: list[dict[str, str]] = field(default_factory=list)  # ready-made (data.teacher_key), else empty

    @property
    def texts(self) -> list[str]:
        """Every text of the problem, in order."""
        turns = [text for turn in self.teacher_turns for text in turn.values()]
        return [self.id, self.problem, self.answer, self.solution, *turns]


@dataclass(frozen=True)
class Prompt:
    """A problem as token ids: the student's prompt and the privileged teacher's prompt."""

    problem: Problem
    student_ids: list[int]
    teacher_ids: list[int]


def is_right(reward: float) -> bool:
    """Return whether a response of this reward counts as right."""
    return reward > 0.5


@dataclass(frozen=True)
class Rollout:
    """One response sampled from the student by the rollout engine.

    `response_ids` ends with the end-of-turn token when `finish_reason == "stop"`. `rollout_log_probs[t]` is the
    rollout engine's log-probability (nats, at the sampling temperature) of `response_ids[t]`; it never enters the
    log-ratio of the objective. `group` is the index of the prompt in its batch: rollouts of one prompt share it.
    `weight_version` is the version of the weights that sampled the first token. If later weights continued the response
    (rollout.partial), `segments` lists [weight version, number of tokens sampled by it] in order; else it is empty.
    `contexts` are the teacher's prompts if they are made of rollouts of the group (sampling/sampler.py), the first in
    the place of the prompt's `teacher_ids`; [] if none can be made: such a rollout is not trained. Else None.
    `routes` are the experts of all tokens but the last, if they are to be replayed (rollout.routing_replay): uint8
    [tokens - 1, layers, k] as bytes.
    """

    prompt: Prompt
    group: int
    response_ids: list[int]
    rollout_log_probs: list[float]
    finish_reason: str  # "stop" | "length"
    weight_version: int
    text: str = ""
    reward: float = 0.0
    reward_error: str = ""  # the reason why the reward function failed and the reward is 0
    segments: list[list[int]] = field(default_factory=list)
    contexts: list[list[int]] | None = None
    routes: bytes = b""

    @property
    def right(self) -> bool:
        return is_right(self.reward)

    @property
    def teacher_prompts(self) -> list[list[int]]:
        """Return the teacher's prompts before the response, one or more; the student's own if nothing else serves."""
        return self.contexts or [self.prompt.teacher_ids or self.prompt.student_ids]

    @property
    def routed_tokens(self) -> int:
        """Tokens that `routes` covers: of prompt and response, all but the last."""
        return len(self.prompt.student_ids) + len(self.response_ids) - 1

    @property
    def versions(self) -> list[list[int]]:
        """[weight version, number of tokens] of every segment of the response."""
        return self.segments or [[self.weight_version, len(self.response_ids)]]


def save_rollouts(rollouts: list[Rollout], path: Path) -> None:
    """Write one JSON object per line, atomically. Raises RunError if `path` exists or cannot be written."""
    if path.exists():
        raise RunError(f"{path} exists already; rollouts are never overwritten")
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for rollout in rollouts:
            row = asdict(rollout) | {"routes": base64.b64encode(rollout.routes).decode()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def load_rollouts(path: Path, most: int | None = None) -> list[Rollout]:
    """Load rollouts of `save_rollouts`, or the first `most` of them, executing nothing.

    Raises BadArgument, naming the line, if one is invalid.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            lines = list(islice(file, most))
    except OSError as error:
        raise BadArgument(f"{path} cannot be read: {error.strerror}") from None
    rollouts = []
    for number, line in enumerate(lines, 1):
        try:
            rollouts.append(_rollout(json.loads(line.decode())))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadArgument(f"{path}, line {number}: not a rollout as save_rollouts writes it ({reason})") from None
    return rollouts


def _rollout(row: dict) -> Rollout:
    """Build a rollout from its JSON object. Raises ValueError, KeyError, TypeError or AttributeError if it is none."""
    prompt = row.pop("prompt")
    problem = Problem(**prompt.pop("problem"))
    routes = base64.b64decode(row.pop("routes", ""), validate=True)
    rollout = Rollout(prompt=Prompt(problem=problem, **prompt), routes=routes, **row)
    texts = [*problem.texts, rollout.finish_reason, rollout.text, rollout.reward_error]
    contexts = [] if rollout.contexts is None else rollout.contexts
    if type(contexts) is not list or not all(contexts):
        raise ValueError("contexts must be null, or a list of prompts that are not empty")
    ids = [rollout.prompt.student_ids, rollout.prompt.teacher_ids, rollout.response_ids, *contexts]
    numbers = [rollout.reward, *rollout.rollout_log_probs]
    counts = [rollout.group, *(token for tokens in ids for token in tokens)]
    if not all(type(text) is str for text in texts) or rollout.finish_reason not in ("stop", "length"):
        raise ValueError("a text is missing, or finish_reason is neither stop nor length")
    if not all(type(tokens) is list for tokens in ids) or not all(type(c) is int and c >= 0 for c in counts):
        raise ValueError("group and tokens must be integers from 0 on")
    if not all(type(number) in (int, float) for number in numbers) or not 0 <= rollout.reward <= 1:
        raise ValueError("reward must lie in [0, 1], and log-probs be numbers")
    _ = [float(number) for number in numbers]  # OverflowError: JSON's integers are unbounded
    if type(rollout.weight_version) is not int:
        raise ValueError("weight_version must be an integer")
    if rollout.segments != []:
        versions, lengths = zip(*rollout.segments, strict=True)
        integers = all(type(number) is int for number in (*versions, *lengths))
        whole = integers and min(lengths) > 0 and sum(lengths) == len(rollout.response_ids)
        if not whole or versions[0] != rollout.weight_version or list(versions) != sorted(set(versions)):
            raise ValueError("segments must be [version, tokens] from weight_version on, and add up to the response")
    if not rollout.prompt.student_ids or not 0 < len(rollout.response_ids) == len(rollout.rollout_log_probs):
        raise ValueError("an empty prompt or response, or not one log-prob a response token")
    if len(routes) % rollout.routed_tokens:
        raise ValueError("routes are not those of all tokens but the last")
    return rollout
