"""One reader for the fields of each data set: a row in, (problem, answer, solution) out."""

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_egrsd.data.boxes import boxes
from megatron_egrsd.data.problems import read_rows
from megatron_egrsd.data.samples import Problem
from megatron_egrsd.data.values import answer_text, plain_value
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.rewards.answers import gold_answer


def dapo(row: dict) -> tuple[str, str, str]:
    """Read DAPO-Math: a chat prompt that wraps the problem in instructions, and an answer. There is no solution."""
    prompt = row["prompt"] or ""
    problem = prompt if isinstance(prompt, str) else prompt[-1]["content"] or ""
    if problem.startswith("Solve the following math problem"):
        problem = problem.partition("\n\n")[2]
    answer = "" if row["reward_model"] is None else row["reward_model"]["ground_truth"]
    return problem.partition("\n\nRemember to put your answer")[0], answer, ""


_ASKS_FOR_A_BOX = "Return your final response within \\boxed{}."  # before OpenThoughts' problems


def openthoughts(row: dict) -> tuple[str, str, str]:
    """Read OpenThoughts with metadata: the answer is the box in the published solution, which teaches as well."""
    problem = (row["problem"] or "").removeprefix(_ASKS_FOR_A_BOX)
    solution = row["ground_truth_solution"] or ""
    is_math = row.get("domain", "math") == "math" and "\\boxed" in solution
    return problem, gold_answer(solution) if is_math else "", solution


def boxed(row: dict) -> tuple[str, str, str]:
    """Read Openthoughts_math_30k_opsd (the EGRSD paper's set): the answer is the solution's last box."""
    solution = row["solution"] or ""
    found = boxes(solution)
    return (row["problem"] or "").removeprefix(_ASKS_FOR_A_BOX), found[-1].content if found else "", solution


def deepmath(row: dict) -> tuple[str, str, str]:
    """Read DeepMath: the first of three R1 answers is the solution, without its thinking."""
    return row["question"], row["final_answer"], (row.get("r1_solution_1") or "").rpartition("</think>")[2]


def plain(row: dict) -> tuple[str, str, str]:
    """Read problem or question, answer and solution; a GSM8K answer or a boxed solution holds both."""
    solution = row.get("solution") or ""
    answer = row.get("answer")
    if answer is None:
        answer = gold_answer(solution) if "\\boxed" in solution else ""
    elif isinstance(answer, str) and "####" in answer:
        answer, solution = gold_answer(answer), solution or answer.partition("####")[0]
    return row.get("problem") or row["question" if "question" in row else "problem"], answer, solution


def reader(row: dict, location: str) -> Callable[[dict], tuple[str, str, str]]:
    """Return the reader whose fields `row` has; BadArgument naming the fields if there is none."""
    for fields, read in (
        ({"prompt", "reward_model"}, dapo),
        ({"problem", "ground_truth_solution"}, openthoughts),
        ({"question", "final_answer"}, deepmath),
        ({"problem", "answer"}, plain),
        ({"problem", "solution"}, boxed),
        ({"question", "answer"}, plain),
    ):
        if fields <= row.keys():
            return read
    raise BadArgument(
        f"{location} has the fields {', '.join(row)}; none of the known datasets does. "
        "Rename them to problem, answer and solution (docs/guides/data.md)"
    )


def read_problems(source: str) -> Iterator[Problem]:
    """Yield every row of `source` as a Problem; an answer or a solution that is missing or no text is empty."""
    read = None
    for location, number, row in read_rows(source):
        read = read or reader(row, location)
        row = {key: plain_value(value) for key, value in row.items()}
        try:
            problem, answer, solution = read(row)
            problem, solution = ("" if text is None else str(text).strip() for text in (problem, solution))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise BadArgument(f"{location} is not like the rows before it ({type(error).__name__}: {error})") from None
        extra = row.get("extra_info")
        own = row.get("id", extra.get("index") if isinstance(extra, dict) else None)
        yield Problem(
            str(own) if own is not None else f"{Path(source).stem}-{number}", problem, answer_text(answer), solution
        )
