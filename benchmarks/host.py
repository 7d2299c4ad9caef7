"""Time rank 0's CPU on the responses of a step, in seconds for a million tokens (docs/measurements/scaling.md).

    python -m benchmarks.host [--tokenizer DIRECTORY] [--tokens 4255] [--responses 200]

Responses are solutions of the GSM8K test set, one after the other; without a tokenizer, a byte-level BPE is trained on
the problem sets of the tests.
"""

import argparse
import json
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import orjson

from benchmarks.measure import in_turn, table
from megatron_egrsd.data.samples import Problem, Prompt, Rollout
from megatron_egrsd.rewards.reward import math_reward
from megatron_egrsd.rollout.generation import read_answer, read_apart

_DATA = Path(__file__).parents[1] / "tests/data"


def _lines(file: str) -> list[dict]:
    return [json.loads(line) for line in (_DATA / file).read_text(encoding="utf-8").splitlines()]


def own_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=32_000, show_progress=False)
    files = (_lines(path.name) for path in sorted(_DATA.glob("*.jsonl")))
    bpe.train_from_iterator((str(value) for rows in files for row in rows for value in row.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def responses(tokenizer, length: int) -> Iterator[tuple[list[int], str]]:
    """Yield (token ids, right answer) without end: `length` tokens of solutions, and the last answer in a box."""
    ids: list[int] = []
    while True:
        for row in _lines("gsm8k_test.jsonl"):
            ids += tokenizer.encode(row["answer"] + "\n", add_special_tokens=False)
            if len(ids) >= length:
                answer = row["answer"].rpartition("####")[2].strip()
                yield ids[:length] + tokenizer.encode(f" \\boxed{{{answer}}}", add_special_tokens=False), answer
                ids = []


def server_answer(ids: list[int]) -> bytes:
    """Return the answer as SGLang sends it."""
    entries = [[-0.1234567890123456 - token / 1e6, token, None] for token in ids]
    meta = {"finish_reason": {"type": "stop"}, "weight_version": "3", "output_token_logprobs": entries}
    return orjson.dumps({"text": "", "output_ids": ids, "meta_info": meta})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="a Hugging Face checkpoint's directory")
    parser.add_argument("--tokens", type=int, default=4255, help="of a response; docs/measurements/scaling.md's mean")
    parser.add_argument("--responses", type=int, default=200)
    options = parser.parse_args()
    if options.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    else:
        tokenizer = own_tokenizer()

    source = responses(tokenizer, options.tokens)
    sampled, golds = zip(*(next(source) for _ in range(options.responses)), strict=True)
    raw = [server_answer(ids) for ids in sampled]
    texts = [tokenizer.decode(ids) for ids in sampled]
    prompts = [Prompt(Problem("p", "?", gold), ids[:300], ids[:1500]) for ids, gold in zip(sampled, golds, strict=True)]
    rollouts = [Rollout(p, 0, ids, [-0.5 - i / 1e6 for i in ids], "stop", 3)
                for p, ids in zip(prompts, sampled, strict=True)]  # fmt: skip
    pickled = pickle.dumps(rollouts)
    if sum(map(math_reward, texts, golds)) < len(texts):
        sys.exit("a right answer has no reward: what is timed is not what a run does")

    work: dict[str, Callable[[], object]] = {
        "read SGLang's answers": lambda: [read_answer(answer) for answer in raw],
        "the same in a process of its own: what is left for this one": lambda: [read_apart(answer) for answer in raw],
        "decode": lambda: [tokenizer.decode(ids, skip_special_tokens=True) for ids in sampled],
        "reward": lambda: [math_reward(text, gold) for text, gold in zip(texts, golds, strict=True)],
        "share with the other ranks: pickle": lambda: pickle.dumps(rollouts),
        "on every other rank: unpickle": lambda: pickle.loads(pickled),
    }
    tokens = sum(map(len, sampled))
    print(f"{options.responses} responses, {tokens:,} tokens, {len(raw[0]) / len(sampled[0]):.0f} bytes a token of "
          f"SGLang's answer, {len(pickled) / tokens:.0f} of what is shared\n")  # fmt: skip
    seconds = in_turn(work, 5, _processor_seconds)
    rows = ([name, f"{median(found) / tokens * 1e6:.2f}"] for name, found in seconds.items())
    print(table(["", "seconds for a million tokens, one core"], rows))


def _processor_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
