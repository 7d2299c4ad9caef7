"""One run of TRL's GRPOTrainer for end_to_end.py, in TRL's own environment: `python -m benchmarks.trl_grpo DIRECTORY`.

Reads DIRECTORY/case.json, writes the keys of our metrics.jsonl. The seconds of generation are those of TRL's own
profiler; the rest of a step, without the preparation of its inputs, is training.
"""

import json
import sys
import time
from pathlib import Path

import torch
import trl.extras.profiling
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from megatron_egrsd.rewards.reward import grade, load_reward
from megatron_egrsd.system.files import write_text


class Recorder(TrainerCallback):
    """One row a step. `seconds` collects TRL's profile of the step under way, `batch` what its reward saw."""

    def __init__(self):
        self.rows, self.seconds, self.batch = [], {}, {}

    def on_train_begin(self, args, state, control, **_):
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        now = time.perf_counter()
        step, self.last = now - self.last, now
        generate, prepare = self._seconds(".transformers.generate"), self._seconds("._prepare_inputs")
        self.rows.append({"step": state.global_step, "time/step": step, "time/generate": generate,
                          "time/prepare": prepare - generate, "time/train": step - prepare, **self.batch})  # fmt: skip
        self.seconds.clear()

    def _seconds(self, suffix: str) -> float:
        return sum(seconds for name, seconds in self.seconds.items() if name.endswith(suffix))


def main(directory: Path) -> None:
    case = json.loads((directory / "case.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    assert all(tokenizer(p["text"])["input_ids"] == p["ids"] for p in case["order"]), "TRL would read other tokens"
    recorder, reward = Recorder(), load_reward(case["reward"])

    def collect(context, seconds):  # TRL measures these itself, but only sends them to wandb and its like
        recorder.seconds[context.name] = recorder.seconds.get(context.name, 0.0) + seconds

    trl.extras.profiling.ProfilingContext._log_metrics = collect

    def rewards(completions, completion_ids, answer, **_):
        lengths = [len(ids) for ids in completion_ids]
        reasons = ["stop" if ids[-1] == tokenizer.eos_token_id else "length" for ids in completion_ids]
        values = [grade(*args, reward)[0] for args in zip(completions, answer, reasons, strict=True)]
        recorder.batch = {"batch/tokens": sum(lengths), "longest": max(lengths), "rollouts": len(lengths),
                          "reward/mean": sum(values) / len(values)}  # fmt: skip
        return values

    rollouts = case["prompts"] * case["per_prompt"]
    config = GRPOConfig(
        output_dir=str(directory / "out"),
        max_steps=case["steps"],
        per_device_train_batch_size=case["microbatch"],
        gradient_accumulation_steps=rollouts // case["microbatch"],
        num_generations=case["per_prompt"],
        max_completion_length=case["longest"],
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        epsilon=0.2,
        epsilon_high=0.28,
        learning_rate=case["lr"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=True,
        use_vllm=False,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"prompt": p["text"], "answer": p["answer"]} for p in case["order"]]
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    GRPOTrainer(
        model, rewards, config, Dataset.from_list(rows), processing_class=tokenizer, callbacks=[recorder]
    ).train()
    assert all(row["rollouts"] == rollouts for row in recorder.rows)
    write_text(directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in recorder.rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
