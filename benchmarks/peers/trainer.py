"""What the two TRL trainers share: the trainer's own loop, stopped and timed at the end of each step."""

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader
from worker import Worker


def arguments(worker: Worker, steps: int) -> dict[str, Any]:
    """Settings of any transformers trainer: the job's optimizer at a constant rate, no files, no gradient checkpointing."""
    optimizer = worker.job["optimizer"]
    return {
        "output_dir": "trainer", "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_steps": steps,
        "gradient_checkpointing": False, "bf16": False, "use_cpu": worker.device.type == "cpu",
        "learning_rate": worker.job["learning_rate"], "lr_scheduler_type": "constant",
        "adam_beta1": optimizer["beta1"], "adam_beta2": optimizer["beta2"], "adam_epsilon": optimizer["eps"],
        "weight_decay": optimizer["weight_decay"], "max_grad_norm": optimizer["clip_norm"],
        "model_init_kwargs": {"dtype": worker.job["dtype"], "attn_implementation": worker.job.get("attention", "sdpa")},
    }  # fmt: skip


def tokenizer(transformers: ModuleType) -> Any:
    """A tokenizer with the special tokens alone: everything comes tokenised."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def dealt(items: Sequence[int], parts: int) -> list[list[int]]:
    """Items in order, in as many batches of nearly equal number."""
    bounds = [round(part * len(items) / parts) for part in range(parts + 1)]
    return [list(items[start:end]) for start, end in itertools.pairwise(bounds)]


def measured(trainer_class: type, worker: Worker, transformers: ModuleType, groups: list[list[int]] | None) -> type:
    """The trainer with its steps reported. groups: which examples make each batch; None leaves that to the trainer."""

    class Callback(transformers.TrainerCallback):  # type: ignore[name-defined]
        def __init__(self, owner: Any) -> None:
            self.owner = owner

        def on_train_begin(self, args, state, control, **_):
            control.should_training_stop = not worker.start()

        def on_step_end(self, args, state, control, **_):
            loss, self.owner.step_loss = self.owner.step_loss, 0.0
            counts, self.owner.step_counts = self.owner.step_counts, {"tokens": 0, "documents": 0}
            if not worker.done(loss, **counts):
                control.should_training_stop = True

    class Measured(trainer_class):
        step_loss: Any = 0.0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.step_counts = {"tokens": 0, "documents": 0}
            super().__init__(*args, **kwargs)
            self.add_callback(Callback(self))

        def training_step(self, model, inputs, num_items_in_batch=None):
            # Without padding; a padding-free batch has positions instead of a mask.
            mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
            counted = (mask.sum(), len(mask)) if mask is not None else (positions.numel(), (positions == 0).sum())
            for name, count in zip(self.step_counts, counted, strict=True):
                self.step_counts[name] += int(count)
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.step_loss = self.step_loss + loss.detach()
            return loss

        def get_train_dataloader(self) -> DataLoader:
            if groups is None:
                return super().get_train_dataloader()
            dataset = self._remove_unused_columns(self.train_dataset, description="training")
            loader = DataLoader(dataset, batch_sampler=groups, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    return Measured
