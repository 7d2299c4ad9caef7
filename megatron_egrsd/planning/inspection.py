"""Show what a run would read: `megatron-egrsd doctor MODEL DATA`. No weights are loaded, and nothing is started."""

import difflib
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megatron_egrsd.config import Config
from megatron_egrsd.data.problems import BadRows
from megatron_egrsd.data.prompt_builder import PromptBuilder, generation_prompt, prompt_builder
from megatron_egrsd.data.prompts import build_prompts
from megatron_egrsd.data.samples import Prompt
from megatron_egrsd.data.solutions import Solutions
from megatron_egrsd.data.stopping import stop_token_ids
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.architecture import Architecture
from megatron_egrsd.hf.checkpoint import HFCheckpoint, holds_weights
from megatron_egrsd.objectives.load import needs_rollouts, needs_teacher_prompts
from megatron_egrsd.rewards.answers import gold_answer
from megatron_egrsd.rewards.normal_form import normalize, number

_TEACHER_ALONE = "bold cyan"
_LONGEST = 6000  # characters of a prompt that are shown


def inspect(config: Config, console: Console | None = None) -> bool:
    """Print what a run of `config` would read; return whether it could begin with this model and these problems.

    Raises BadArgument if the model, its template or the file of problems cannot be read at all.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    builder = prompt_builder(config)
    fits = _print_model(config, builder, console)
    bad, solutions = BadRows("skip"), None if needs_rollouts(config.objective) else Solutions(builder, config)
    privileged = needs_teacher_prompts(config)
    prompts = build_prompts(config.data.train, builder, bad, privileged=privileged, solutions=solutions)
    if prompts:
        _print_prompt(prompts[0], builder, console)
        _print_lengths(config, prompts, builder, console)
        _print_answers(prompts, console)
    refused = f"; refused (or left out with data.bad_rows skip) would be {bad}" if bad.places else ""
    console.print(Text(f"\nproblems  {len(prompts)} can be used{refused}"))
    return fits and bool(prompts) and not (bad.places and config.data.bad_rows == "refuse")


def _print_model(config: Config, builder: PromptBuilder, console: Console) -> bool:
    """Print model, weights, generation prompt and stop tokens; return whether the weights can be trained."""
    path, tokenizer = Path(config.model.path), builder.tokenizer
    arch, fits = Architecture.from_pretrained(path), True
    console.print(f"model     {arch.num_parameters:,} parameters, context {arch.max_position_embeddings:,} tokens")
    try:
        weights = HFCheckpoint(path).describe() if holds_weights(path) else "none here; a run needs them"
    except BadArgument as error:
        weights, fits = f"cannot be used: {error}", False
    console.print(f"weights   {weights}")
    console.print(Text(f"template  responses begin behind {generation_prompt(tokenizer, config.data)!r}"))
    if builder.opened:
        console.print("          the prompt opens the thinking; a response that never ends it has no answer")
    stop = stop_token_ids(tokenizer, config.data, config.rollout.stop_tokens)
    console.print(Text(f"          and end with {' or '.join(map(repr, tokenizer.convert_ids_to_tokens(stop)))}"))
    return fits


def _print_prompt(prompt: Prompt, builder: PromptBuilder, console: Console) -> None:
    """Print the first problem's prompts, the tokens that only the teacher reads in colour and between ⟦ and ⟧."""
    decode = builder.tokenizer.decode
    console.print(f"\nstudent   reads {len(prompt.student_ids)} tokens of problem {prompt.problem.id}:", style="bold")
    console.print(Text(decode(prompt.student_ids)[:_LONGEST]))
    if not prompt.teacher_ids:
        return
    console.print(f"\nteacher   reads {len(prompt.teacher_ids)} tokens, those in ⟦ ⟧ alone:", style="bold")
    shown = Text()
    matcher = difflib.SequenceMatcher(None, prompt.student_ids, prompt.teacher_ids, autojunk=False)
    for kind, _, _, start, end in matcher.get_opcodes():
        piece = decode(prompt.teacher_ids[start:end])
        if piece:
            shown.append(piece if kind == "equal" else f"⟦{piece}⟧", None if kind == "equal" else _TEACHER_ALONE)
    console.print(shown[:_LONGEST])


def _print_lengths(config: Config, prompts: list[Prompt], builder: PromptBuilder, console: Console) -> None:
    """Print the lengths of prompts and solutions, and the share of solutions that a response has no room for."""
    console.print("\ntokens    shortest, median and longest", style="bold")
    solutions = [p.problem.solution for p in prompts if p.problem.solution]
    lengths = [len(builder.tokenizer.encode(text, add_special_tokens=False)) for text in solutions]
    rows = {"student": [len(p.student_ids) for p in prompts], "teacher": [len(p.teacher_ids) for p in prompts]}
    for name, values in (rows | {"solution": lengths}).items():
        if any(values):
            console.print(f"          {name:<9} {_three(values)}")
    room = config.rollout.max_response_tokens
    if lengths:
        cut = sum(length + 1 > room for length in lengths) / len(lengths)
        console.print(
            f"          {cut:.1%} of the solutions are longer than rollout.max_response_tokens = {room}: about as many "
            "responses would be cut off and rewarded with 0, more if the model thinks first"
        )
    else:
        console.print("          no solutions: how many responses would be cut off is not known")


def _three(values: Sequence[int]) -> str:
    return f"{min(values):>7,} {round(statistics.median(values)):>7,} {max(values):>7,}"


def _print_answers(prompts: list[Prompt], console: Console) -> None:
    kinds = Counter(answer_kind(p.problem.answer) for p in prompts)
    console.print("\nanswers   " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()), style="bold")
    for kind in kinds:
        example = next(p.problem for p in prompts if answer_kind(p.problem.answer) == kind)
        console.print(Text(f"          {kind:<15} such as {example.answer[:60]!r} of problem {example.id}"))


def answer_kind(answer: str) -> str:
    """Return what kind of answer the reward compares: a number, a choice, a list, an expression, or words."""
    text = normalize(gold_answer(answer)[:400])
    if (value := number(text)) is not None:
        return "whole number" if value.denominator == 1 else "other number"
    if re.fullmatch("[a-j]", text):
        return "choice"
    if re.fullmatch(r"[^\W\d_][^\d\\=+^(){}\[\]]{2,}", text):
        return "words"
    return "list" if re.search(r"[,;]|\\cup|\bor\b", text) else "expression"
