"""Prompts in, rewarded rollouts out: shared by training and held-out evaluation. Runs on rank 0 only."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_egrsd.config import Config, EvaluationConfig, RolloutConfig
from megatron_egrsd.data.prompt_builder import opened_thinking, prompt_builder
from megatron_egrsd.data.samples import Prompt, Rollout
from megatron_egrsd.data.siblings import SiblingContexts
from megatron_egrsd.objectives.load import needs_teacher
from megatron_egrsd.rewards.reward import WORKERS, decode_and_grade, load_reward, warn_of_failures
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.generation import Generation
from megatron_egrsd.sampling.majority import MajorityContexts

Contexts = Callable[[list[Rollout]], list[Rollout]]


class Sampler:
    """Sampler of responses through SGLang, which are decoded and rewarded.

    `opened` is what the prompts open and leave to the responses to close (prompt_builder.opened_thinking). `contexts`
    gives the rollouts that are trained what their teacher reads, if that needs the whole group (`group_contexts`).
    """

    def __init__(self, client: RolloutClient, tokenizer, reward: Callable[[str, str], float], opened: str = "",
                 contexts: Contexts | None = None):  # fmt: skip
        self.client, self.tokenizer, self.reward, self.opened = client, tokenizer, reward, opened
        self.contexts = contexts or (lambda rollouts: rollouts)
        self.threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="reward")

    def sample(
        self, prompts: list[Prompt], n: int, settings: RolloutConfig | EvaluationConfig, done: dict | None = None
    ) -> list[Rollout]:
        """Return n rewarded rollouts of each prompt, in the order of the prompts; `group` is the prompt's position.

        `settings` holds temperature, top_p and top_k.

        A response is rewarded as soon as it is finished, while others are still sampled. Responses in `done`, which is
        filled as in RolloutClient.generate, are not sampled again.
        """
        rewards: dict[tuple[int, int], Future[Rollout]] = {}

        def finished(i: int, j: int, generation: Generation) -> None:
            rewards[i, j] = self._reward(prompts[i], i, generation)

        for (i, j), generation in (done or {}).items():
            finished(i, j, generation)
        ids = [p.student_ids for p in prompts]
        try:
            routes = isinstance(settings, RolloutConfig) and settings.routing_replay
            self.client.generate(ids, n, settings=settings, done=done, finished=finished, routes=routes)
            return self._await([rewards[i, j] for i in range(len(prompts)) for j in range(n)])
        finally:
            for future in rewards.values():
                future.cancel()

    def rewarded(self, prompt: Prompt, generations: list[Generation]) -> list[Rollout]:
        """Return rewarded rollouts of all finished responses to one prompt, to be trained, as group 0."""
        return self.contexts(self._await([self._reward(prompt, 0, generation) for generation in generations]))

    def _reward(self, prompt: Prompt, group: int, generation: Generation) -> "Future[Rollout]":
        return self.threads.submit(self._rollout, prompt, group, generation)

    def _rollout(self, prompt: Prompt, group: int, g: Generation) -> Rollout:
        answer = prompt.problem.answer
        text, reward, error = decode_and_grade(
            self.tokenizer, g.response_ids, answer, g.finish_reason, self.reward, self.opened
        )
        return Rollout(
            prompt=prompt,
            group=group,
            response_ids=g.response_ids,
            rollout_log_probs=g.log_probs,
            finish_reason=g.finish_reason,
            weight_version=g.weight_version,
            text=text,
            reward=reward,
            reward_error=error,
            segments=g.segments if len(g.segments) > 1 else [],
            routes=g.routes,
        )

    @staticmethod
    def _await(futures: "list[Future[Rollout]]") -> list[Rollout]:
        rollouts = [future.result() for future in futures]
        warn_of_failures(rollouts)
        return rollouts


def training_sampler(config: Config, client: RolloutClient, tokenizer) -> Sampler:
    """Make the sampler of a training run: with its reward, and with the contexts that its teacher reads."""
    reward = load_reward(config.data.reward, config.data.reward_timeout)
    contexts = group_contexts(config) if needs_teacher(config.objective) else None
    return Sampler(client, tokenizer, reward, opened_thinking(tokenizer, config.data), contexts)


def group_contexts(config: Config) -> Contexts | None:
    """Make the contexts that `config` names; None if they need no rollouts, and each prompt has its own."""
    if not config.data.reads_siblings:
        return None
    make = MajorityContexts if config.data.teacher_context == "majority" else SiblingContexts
    return make(prompt_builder(config))
