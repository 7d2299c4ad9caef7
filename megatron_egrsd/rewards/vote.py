"""The answer that most responses to a problem agree on. Nobody need know the right one."""

from megatron_egrsd.rewards.answers import final_answer, states_answer
from megatron_egrsd.rewards.equality import equal


def majority_answer(responses: list[str]) -> str:
    """Return the most frequent final answer of `responses`, in the words of the first that gives it, or "" if none is.

    The vote of TTRL (arXiv 2504.16084, section 2): every response that states an answer has one vote. Ours: answers
    that the reward "math" finds equal are one, in the order of the responses (TTRL's code compares simplified
    spellings); and answers that tie for the first place, or that only one response gives, are no majority (there the
    first wins).
    """
    votes: dict[str, int] = {}
    for response in filter(states_answer, responses):
        readings = final_answer(response)
        answer = next((first for first in votes if any(equal(first, reading) for reading in readings)), readings[0])
        votes[answer] = votes.get(answer, 0) + 1
    most = max(votes.values(), default=0)
    leaders = [answer for answer, count in votes.items() if count == most]
    return leaders[0] if most > 1 and len(leaders) == 1 else ""
