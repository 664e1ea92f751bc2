"""A transformers model in a plain loop on the same packed rows, with the same AdamW and clipping as ours.

Modes: eager, compile (torch.compile, in the warm-up), liger (Liger-Kernel's operators and fused head).
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from steps import Row, Steps
from torch import Tensor, nn
from worker import Worker


def main() -> None:
    worker = Worker()
    mode = worker.job["mode"]
    if mode == "liger":
        worker.need("liger_kernel")
    (transformers,) = worker.need("transformers")
    if mode == "liger" and worker.device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        worker.missing("Liger-Kernel needs a GPU")
    model = transformers.MistralForCausalLM.from_pretrained(
        worker.job["weights"], dtype=worker.dtype, attn_implementation="sdpa"
    )
    model = model.to(worker.device).train()
    if mode == "liger":
        (liger,) = worker.need("liger_kernel.transformers")
        liger.apply_liger_kernel_to_mistral(model=model)
    train(worker, torch.compile(model) if mode == "compile" else model)


def adamw(worker: Worker, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with the job's constants; weight decay on matrices only."""
    settings, every = worker.job["optimizer"], list(parameters)
    groups = [
        {"params": [parameter for parameter in every if parameter.ndim > 1], "weight_decay": settings["weight_decay"]},
        {"params": [parameter for parameter in every if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (settings["beta1"], settings["beta2"])
    return torch.optim.AdamW(groups, lr=worker.job["learning_rate"], betas=betas, eps=settings["eps"], fused=True)


def causal_lm_loss(model: Any, row: Row, trained: float) -> Tensor:
    """A row's part of the step's loss. Equally long documents form a rectangle, which needs no mask between documents."""
    if len(set(row.lengths)) == 1:
        shape, positions = (len(row.lengths), row.lengths[0]), {}
    else:
        shape, positions = (1, len(row.tokens_T)), {"position_ids": row.positions_T[None]}
    labels = row.labels_T.view(shape)
    given = {"input_ids": row.tokens_T.view(shape), "labels": labels, "shift_labels": labels, "use_cache": False}
    return model(**given, num_items_in_batch=trained, **positions).loss


def train(worker: Worker, model: Any, loss_of: Callable[[Any, Row, float], Tensor] = causal_lm_loss) -> None:
    """Serve steps: every micro-batch forward and backward, clip, AdamW."""
    steps, limit = Steps(worker.job["steps_file"]), worker.job["optimizer"]["clip_norm"]
    update = adamw(worker, model.parameters())

    def step(index: int) -> Tensor:
        total, trained = torch.zeros((), device=worker.device), steps.trained(index)
        for row in steps.rows(index):
            tensors = (tensor.to(worker.device) for tensor in (row.tokens_T, row.labels_T, row.positions_T))
            loss = loss_of(model, Row(*tensors, row.lengths), trained)
            loss.backward()
            total += loss.detach()
        if limit:
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        update.step()
        update.zero_grad(set_to_none=True)
        return total

    worker.ready()
    worker.serve(step)


if __name__ == "__main__":
    main()
