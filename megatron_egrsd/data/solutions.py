"""Reference solutions as responses: what supervised fine-tuning trains in place of rollouts."""

from megatron_egrsd.config import Config
from megatron_egrsd.data.problems import BadRow
from megatron_egrsd.data.prompt_builder import PromptBuilder
from megatron_egrsd.data.samples import Problem, Prompt, Rollout
from megatron_egrsd.data.stopping import stop_token_ids
from megatron_egrsd.errors import BadArgument


class Solutions:
    """The responses made of solutions, which are written as the chat template writes an assistant's turn."""

    def __init__(self, builder: PromptBuilder, config: Config):
        self.builder, self.longest = builder, config.rollout.max_response_tokens
        self.stop = set(stop_token_ids(builder.tokenizer, config.data, config.rollout.stop_tokens))

    def rollout(self, prompt: Prompt, group: int, version: int) -> Rollout:
        """Return the solution as a right response. Nothing sampled it: its log-probs are 0, and nothing reads them."""
        ids, text = self.response_ids(prompt.problem), prompt.problem.solution
        return Rollout(prompt, group, ids, [0.0] * len(ids), "stop", version, text, reward=1.0)

    def response_ids(self, problem: Problem) -> list[int]:
        """Return the tokens behind the student's prompt, up to the end of the assistant's turn.

        Raises BadRow if there is no solution or if it is too long, BadArgument if the template ends no turn.
        """
        place = f"problem {problem.id}"
        if not problem.solution.strip():
            raise BadRow("without a solution", place, f"{place} has no solution, which is what is trained; fill "
                         "data.solution_key, remove it, or set data.bad_rows skip")  # fmt: skip
        ids = self.builder.response_ids(problem, problem.solution)
        end = max((i for i, token in enumerate(ids) if token in self.stop), default=None)
        if end is None:
            raise BadArgument(
                "the chat template ends what the assistant says with none of the stop tokens, so a model that is "
                "trained on it would never stop; name the token that it writes there in rollout.stop_tokens"
            )
        if end + 1 > self.longest:
            raise BadRow("over-long", place, f"the solution of {place} has {end + 1} tokens, more than "
                         f"rollout.max_response_tokens = {self.longest}; raise that, remove the problem, or set "
                         "data.bad_rows skip")  # fmt: skip
        return ids[: end + 1]
