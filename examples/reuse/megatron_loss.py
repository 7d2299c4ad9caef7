"""A Megatron-LM loss function on the vocab-parallel kernel, checked against megatron-core's own cross-entropy.

    torchrun --nproc-per-node 2 examples/reuse/megatron_loss.py

runs a column-parallel LM head of megatron-core (gloo on CPU, NCCL on GPU), computes the loss both ways and prints the
differences of value and weight gradient. In Megatron-LM's pretrain_gpt.py, replace the loss function by `loss_func`
and call the model without labels, so that it returns its vocab-parallel logits.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel

sys.path.insert(0, str(Path(__file__).parents[2]))
from megatron_egrsd.vocab_parallel import log_prob_and_entropy


def loss_func(
    loss_mask: torch.Tensor, labels: torch.Tensor, vocab_size: int | None, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Return (loss, tokens, report) by Megatron-LM's convention: the summed loss and its number of tokens.

    loss_mask [b, s], labels [b, s] int64, logits [b, s, V / TP]. The entropy comes with the same read of the logits.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    log_prob, entropy = log_prob_and_entropy(
        logits, labels.masked_fill(loss_mask == 0, -100), group=group, vocab_size=vocab_size, inplace_backward=True
    )
    tokens = loss_mask.sum().to(torch.int)
    loss = -log_prob.sum()
    return loss, tokens, {"lm loss": (loss.detach(), tokens), "entropy": (entropy.sum(), tokens)}


def forward_step(batch: dict, model, vocab_size: int | None = None):
    """Return (output of the model, loss function of the output), as Megatron-LM's forward_step."""
    logits = model(batch["hidden"])
    return logits, partial(loss_func, batch["loss_mask"], batch["labels"], vocab_size)


def compare() -> tuple[float, float]:
    """Return the relative differences of loss and weight gradient to megatron-core's vocab_parallel_cross_entropy."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    torch.manual_seed(0)
    b, s, d, v = 2, 8, 32, 512
    config = ModelParallelConfig(
        tensor_model_parallel_size=dist.get_world_size(), use_cpu_initialization=True, params_dtype=torch.float32
    )
    head = tensor_parallel.ColumnParallelLinear(
        d, v, config=config, init_method=torch.nn.init.normal_, bias=False, gather_output=False
    ).to(device)
    batch = {
        "hidden": torch.randn(b, s, d, device=device),
        "labels": torch.randint(0, v, (b, s), device=device),
        "loss_mask": (torch.rand(b, s, device=device) < 0.8).float(),
    }
    logits, waiting = forward_step(batch, lambda hidden: head(hidden)[0])
    loss, tokens, _ = waiting(logits)
    (loss / tokens).backward()
    ours = head.weight.grad.clone()
    head.weight.grad = None
    token_loss = tensor_parallel.vocab_parallel_cross_entropy(head(batch["hidden"])[0], batch["labels"])
    reference = (token_loss * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    reference.backward()
    return (
        abs((loss / tokens / reference).item() - 1),
        ((ours - head.weight.grad).norm() / head.weight.grad.norm()).item(),
    )


if __name__ == "__main__":
    loss_difference, gradient_difference = compare()
    if dist.get_rank() == 0:
        print(f"loss: {loss_difference:.1e} relative; weight gradient: {gradient_difference:.1e} relative L2")
    dist.destroy_process_group()
