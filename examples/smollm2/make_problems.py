"""Write word problems of one to three steps with their answers and worked solutions: train.jsonl and heldout.jsonl.

A problem is a story about one quantity: it begins with a number or with groups of equal size, some events add to it or
take from it, and the question asks for what is left, for an equal share, or for a price. Each of these but a plain
beginning and a plain question is a step. Held-out problems have other stories, things and names than training problems;
their numbers are drawn from the same ranges.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
from dataclasses import dataclass
from pathlib import Path

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
LARGEST = 40  # of any number in a problem or its solution


@dataclass(frozen=True)
class Story:
    """The sentences of a story.

    Args:
        plain: The beginning with {n} things.
        groups: The beginning with {k} groups of {n} things.
        gains: Events that add {n} things.
        losses: Events that take {n} things away.
        left: The question for the number of things at the end.
        shared: An equal share of the things for each of {k}, and the question for it.
        sold: A price of {k} dollars for each thing, and the question for all of them.
    """

    plain: str
    groups: str
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    left: str
    shared: str
    sold: str


TRAINING = (
    Story(
        "{name} has {n} stickers.",
        "{name} has {k} sheets with {n} stickers on each.",
        ("{name} gets {n} more stickers from a friend.", "{name} buys {n} more stickers."),
        ("{name} gives {n} stickers away.", "{name} loses {n} stickers."),
        "How many stickers does {name} have now?",
        "{name} shares all the stickers equally among {k} friends. How many stickers does each friend get?",
        "{name} sells all the stickers for {k} dollars each. How many dollars does {name} get?",
    ),
    Story(
        "{name} has a basket with {n} apples.",
        "{name} has {k} bags with {n} apples in each.",
        ("{name} picks {n} more apples.", "A neighbor brings {n} more apples."),
        ("{name} eats {n} apples.", "{n} apples are rotten and {name} throws them away."),
        "How many apples are left?",
        "{name} puts all the apples into {k} boxes, the same number into each. How many apples are in each box?",
        "{name} sells all the apples for {k} dollars each. How many dollars does {name} earn?",
    ),
    Story(
        "There are {n} pencils in the drawer of {name}.",
        "{name} has {k} packs of {n} pencils.",
        ("{name} finds {n} more pencils.", "The teacher gives {name} {n} more pencils."),
        ("{name} lends {n} pencils to a classmate.", "{n} pencils break."),
        "How many pencils does {name} still have?",
        "{name} divides the pencils equally among {k} children. How many pencils does each child get?",
        "Each pencil is worth {k} dollars. How many dollars are all of them worth?",
    ),
    Story(
        "{name} bakes {n} cookies.",
        "{name} bakes {k} trays with {n} cookies on each.",
        ("{name} bakes {n} more cookies.", "An aunt brings {n} more cookies."),
        ("The children eat {n} cookies.", "{name} drops {n} cookies."),
        "How many cookies are there now?",
        "{name} puts the cookies into {k} jars, the same number into each. How many cookies are in each jar?",
        "{name} sells all the cookies for {k} dollars each. How many dollars is that?",
    ),
    Story(
        "{name} has {n} books on a shelf.",
        "{name} has {k} shelves with {n} books on each.",
        ("{name} buys {n} more books.", "{name} gets {n} more books as a present."),
        ("{name} gives {n} books to the library.", "{name} sells {n} of the books."),
        "How many books does {name} have left?",
        "{name} packs all the books into {k} boxes, the same number into each. How many books are in each box?",
        "Each book costs {k} dollars. How much do all of these books cost in dollars?",
    ),
    Story(
        "{name} collects {n} shells on the beach.",
        "{name} fills {k} buckets with {n} shells each.",
        ("On the next day {name} collects {n} more shells.", "A brother gives {name} {n} more shells."),
        ("{name} throws {n} shells back into the sea.", "{n} shells break on the way home."),
        "How many shells does {name} have?",
        "{name} makes {k} equal chains of all the shells. How many shells are on each chain?",
        "{name} sells all the shells for {k} dollars each. How many dollars does {name} make?",
    ),
)

HELD_OUT = (
    Story(
        "In the pond of {name} there are {n} fish.",
        "{name} has {k} tanks with {n} fish in each.",
        ("{n} more fish are born.", "{name} adds {n} new fish."),
        ("A heron catches {n} fish.", "{name} sets {n} fish free in the river."),
        "How many fish are there now?",
        "{name} moves all the fish into {k} ponds, the same number into each. How many fish swim in each pond?",
        "{name} sells all the fish for {k} dollars each. How many dollars does {name} receive?",
    ),
    Story(
        "{name} grows {n} flowers in the garden.",
        "{name} plants {k} rows with {n} flowers in each.",
        ("{name} plants {n} more flowers.", "In spring {n} more flowers come up."),
        ("A rabbit eats {n} flowers.", "{name} cuts {n} flowers for the kitchen."),
        "How many flowers are left in the garden?",
        "{name} ties the flowers into {k} equal bunches. How many flowers are in each bunch?",
        "At the market {name} sells all these flowers for {k} dollars each. How many dollars does {name} take?",
    ),
    Story(
        "{name} blows up {n} balloons for a party.",
        "{name} opens {k} packets with {n} balloons in each.",
        ("A cousin blows up {n} more balloons.", "{name} brings {n} more balloons from the shop."),
        ("{n} balloons burst.", "{n} balloons fly away."),
        "How many balloons does {name} have for the party?",
        "{name} ties the balloons to {k} chairs, the same number to each. How many balloons are on each chair?",
        "Each balloon costs {k} dollars. How many dollars do all these balloons cost?",
    ),
)

NAMES = {
    "train": ("Tom", "Anna", "Ben", "Lucy", "Max", "Emma", "Sam", "Nina", "Paul", "Rosa", "Leo", "Mia"),
    "heldout": ("Oscar", "Clara", "Hugo", "Ida", "Felix", "Greta"),
}
STORIES = {"train": TRAINING, "heldout": HELD_OUT}
CLOSING = "The answer is \\boxed{{{answer}}}."


@dataclass(frozen=True)
class Step:
    """A step of a solution: left operation right = result."""

    left: int
    operation: str
    right: int

    @property
    def result(self) -> int:
        return OPERATIONS[self.operation](self.left, self.right)

    @property
    def fits(self) -> bool:
        """Whether its numbers are between 2 and LARGEST, and its division leaves no rest."""
        exact = self.operation != "/" or self.left % self.right == 0
        return exact and all(2 <= number <= LARGEST for number in (self.left, self.right, self.result))

    def __str__(self) -> str:
        return f"{self.left} {self.operation} {self.right} = {self.result}"


def make_problem(rng: random.Random, story: Story, name: str, steps: int) -> dict[str, str]:
    """Return problem, answer and solution of a problem with so many steps."""
    while True:  # until numbers are drawn that stay small and divide
        sentences, done = _draw(rng, story, name, steps)
        if all(step.fits for step in done):
            break
    answer = str(done[-1].result)
    working = " ".join(f"{step}." for step in done)
    return {
        "problem": " ".join(sentences),
        "answer": answer,
        "solution": f"{working} {CLOSING.format(answer=answer)}",
    }


def _draw(rng: random.Random, story: Story, name: str, steps: int) -> tuple[list[str], list[Step]]:
    """Return sentences and steps; the numbers may be too large, or negative, or a division not exact."""
    grouped = rng.random() < 0.4
    ending = rng.choice(["", "", "/", "*"]) if steps - grouped else ""
    n, k = rng.randint(2, 6) if grouped else rng.randint(4, 20), rng.randint(2, 5)
    sentences, done = [(story.groups if grouped else story.plain).format(name=name, n=n, k=k)], []
    if grouped:
        done.append(Step(k, "*", n))
    for _ in range(steps - grouped - bool(ending)):
        sign, change = rng.choice("+-"), rng.randint(2, 9)
        sentences.append(rng.choice(story.gains if sign == "+" else story.losses).format(name=name, n=change))
        done.append(Step(done[-1].result if done else n, sign, change))
    question = {"": story.left, "/": story.shared, "*": story.sold}[ending]
    k = rng.randint(2, 5)
    sentences.append(question.format(name=name, k=k))
    if ending:
        done.append(Step(done[-1].result if done else n, ending, k))
    return sentences, done


def make_problems(split: str, count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` different problems of a split, as many of one, two and three steps."""
    rng = random.Random(f"{split} {seed}")
    problems: dict[str, dict[str, str]] = {}
    while len(problems) < count:
        steps = 1 + len(problems) % 3
        made = make_problem(rng, rng.choice(STORIES[split]), rng.choice(NAMES[split]), steps)
        problems.setdefault(made["problem"], {"id": f"{split}-{len(problems)}"} | made)
    return list(problems.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory of train.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=1200, help="training problems")
    parser.add_argument("--heldout", type=int, default=64, help="held-out problems")
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    for split in STORIES:
        rows = make_problems(split, getattr(arguments, split), arguments.seed)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.output / f"{split}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
