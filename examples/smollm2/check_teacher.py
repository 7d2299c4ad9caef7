"""Does the teacher know more than the student? Samples from both readers of the last problems of a training set.

Prints how often each is right, and the mean of log p_T - log p_S over the tokens of the student's right and wrong
responses and of the reference solutions. If the teacher is not right more often, CL-EGRSD has nothing to teach.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_egrsd.config_reader import parse_config
from megatron_egrsd.data.prompt_builder import prompt_builder
from megatron_egrsd.data.prompts import load_prompts
from megatron_egrsd.rewards.reward import decode_and_grade, math_reward


@torch.inference_mode()
def sample(model, prompts: list[list[int]], most: int) -> list[list[int]]:
    """Return a response to each prompt at temperature 1, the end of the turn included."""
    width, end = max(map(len, prompts)), model.generation_config.eos_token_id
    ids = torch.tensor([[end] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    rows = model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=True, top_k=0, top_p=1.0)
    rows = rows[:, width:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


@torch.inference_mode()
def log_probs(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Return the log-prob of each token of `response`."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face directory: runs/.../warm_start/hf")
    parser.add_argument("--problems", type=int, default=24)
    arguments = parser.parse_args()

    config = parse_config(["--config", "examples/configs/smollm2_cpu.yaml", "--model.path", arguments.model])
    prompts = load_prompts(config.data.train, prompt_builder(config), privileged=True)[-arguments.problems :]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()

    torch.manual_seed(0)
    most, graded = config.rollout.max_response_tokens, {}
    for reader, ids in (("student", [p.student_ids for p in prompts]), ("teacher", [p.teacher_ids for p in prompts])):
        responses = sample(model, ids, most)
        ended = ["stop" if row[-1] == model.generation_config.eos_token_id else "length" for row in responses]
        rewards = [
            decode_and_grade(tokenizer, row, p.problem.answer, reason, math_reward)[1]
            for row, p, reason in zip(responses, prompts, ended, strict=True)
        ]
        graded[reader] = responses, rewards
        print(f"{reader}: {sum(rewards):.0f} of {len(prompts)} right, {ended.count('length')} cut off", flush=True)

    gaps: dict[str, list[torch.Tensor]] = {"right": [], "wrong": [], "reference": []}
    for prompt, response, reward in zip(prompts, *graded["student"], strict=True):
        solution = [*tokenizer.encode(prompt.problem.solution), model.generation_config.eos_token_id]
        for kind, ids in (("right" if reward else "wrong", response), ("reference", solution)):
            gaps[kind].append(log_probs(model, prompt.teacher_ids, ids) - log_probs(model, prompt.student_ids, ids))
    for kind, found in gaps.items():
        if found:
            mean = torch.cat(found).mean()
            print(f"log p_T - log p_S, mean over the tokens of {len(found)} {kind}: {mean:+.3f} nats")


if __name__ == "__main__":
    main()
