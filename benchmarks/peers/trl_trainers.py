"""TRL's trainers for supervised fine-tuning and preference tuning (DPO), each in its own loop.

Modes of fine-tuning: padded and padding_free (a step is one batch of the documents of ours), accumulated (a document after the
other), packed (TRL packs the same documents best-fit decreasing into rows of the longest document's length, as many a step as
come nearest to our tokens). Modes of DPO: in_loop (the reference runs in each step), precomputed, accumulated (precomputed, a
pair after the other).
"""

import itertools
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from steps import IGNORED, Document, Steps
from torch.utils.data import DataLoader
from worker import Worker, cpu_seconds


def main() -> None:
    worker = Worker()
    trl, transformers, datasets = worker.need("trl", "transformers", "datasets")
    (train_dpo if worker.job["objective"] == "dpo" else train_sft)(worker, trl, transformers, datasets)


def train_sft(worker: Worker, trl: ModuleType, transformers: ModuleType, datasets: ModuleType) -> None:
    steps, mode = Steps(worker.job["steps_file"]), worker.job["mode"]
    documents = [steps.documents(step) for step in range(len(steps))]

    def example(document: Document) -> dict[str, Any]:
        labels = [id if trained else IGNORED for id, trained in zip(document.ids, document.trained, strict=True)]
        return {"input_ids": document.ids, "labels": labels}

    dataset = datasets.Dataset.from_list([example(document) for step in documents for document in step])
    groups = numbered([len(step) for step in documents])
    packed, parts = mode == "packed", min(map(len, groups)) if mode == "accumulated" else 1
    step_tokens = sum(len(document.ids) for step in documents for document in step) / len(steps)
    settings = trl.SFTConfig(
        **arguments(worker, len(steps)),
        max_length=steps.longest if packed else None,
        packing=packed,
        padding_free=mode == "padding_free",
        per_device_train_batch_size=max(1, round(step_tokens / steps.longest)) if packed else 1,
        gradient_accumulation_steps=parts,
    )
    batches = None if packed else [batch for group in groups for batch in dealt(group, parts)]
    trainer = measured(trl.SFTTrainer, worker, transformers, batches)(
        model=worker.job["weights"], args=settings, train_dataset=dataset, processing_class=tokenizer(transformers)
    )
    worker.ready()
    trainer.train()


def train_dpo(worker: Worker, trl: ModuleType, transformers: ModuleType, datasets: ModuleType) -> None:
    steps, mode = Steps(worker.job["steps_file"]), worker.job["mode"]
    pairs = [list(zip(every[0::2], every[1::2], strict=True)) for every in map(steps.documents, range(len(steps)))]

    def example(chosen: Document, rejected: Document) -> dict[str, Any]:
        prompt = {"prompt_ids": chosen.ids[: chosen.prompt]}
        return prompt | {"chosen_ids": chosen.ids[chosen.prompt :], "rejected_ids": rejected.ids[rejected.prompt :]}

    dataset = datasets.Dataset.from_list([example(*pair) for step in pairs for pair in step])
    groups = numbered([len(step) for step in pairs])
    parts = len(groups[0]) if mode == "accumulated" else 1
    settings = trl.DPOConfig(
        **arguments(worker, len(steps)),
        max_length=None,
        beta=worker.job["beta"],
        precompute_ref_log_probs=mode != "in_loop",
        per_device_train_batch_size=len(groups[0]) // parts,
        gradient_accumulation_steps=parts,
    )
    spent = {"seconds": 0.0, "cpu_seconds": 0.0}

    class Tokenised(trl.DPOTrainer):  # type: ignore[name-defined]
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _precompute_ref_logps(self, *args):
            start, cpu_start = time.perf_counter(), cpu_seconds()
            result = super()._precompute_ref_logps(*args)
            spent["seconds"] += time.perf_counter() - start
            spent["cpu_seconds"] += cpu_seconds() - cpu_start
            return result

    batches = [batch for group in groups for batch in dealt(group, parts)]
    trainer = measured(Tokenised, worker, transformers, batches)(
        model=worker.job["weights"], args=settings, train_dataset=dataset, processing_class=tokenizer(transformers)
    )
    worker.ready(**({"reference": spent} if mode != "in_loop" else {}))
    trainer.train()


def arguments(worker: Worker, steps: int) -> dict[str, Any]:
    """Settings of any transformers trainer: the job's optimizer at a constant rate, no files, no activation checkpointing."""
    optimizer = worker.job["optimizer"]
    quiet = {"output_dir": "trainer", "report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False}
    length = {"max_steps": steps, "gradient_checkpointing": False, "use_cpu": worker.device.type == "cpu"}
    rate = {"learning_rate": worker.job["learning_rate"], "lr_scheduler_type": "constant", "adam_epsilon": optimizer["eps"]}
    rate |= {"adam_beta1": optimizer["beta1"], "adam_beta2": optimizer["beta2"]}
    rate |= {"weight_decay": optimizer["weight_decay"], "max_grad_norm": optimizer["clip_norm"]}
    model = {"dtype": worker.job["dtype"], "attn_implementation": "sdpa"}
    return {**quiet, **length, **rate, "model_init_kwargs": model}


def tokenizer(transformers: ModuleType) -> Any:
    """A tokenizer with the special tokens alone: all data is tokenised already."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def numbered(counts: Sequence[int]) -> list[list[int]]:
    """The numbers of each step's examples."""
    ends = list(itertools.accumulate(counts))
    return [list(range(end - count, end)) for count, end in zip(counts, ends, strict=True)]


def dealt(items: Sequence[int], parts: int) -> list[list[int]]:
    """Items in order, in `parts` batches of nearly equal number."""
    bounds = [round(part * len(items) / parts) for part in range(parts + 1)]
    return [list(items[start:end]) for start, end in itertools.pairwise(bounds)]


def measured(
    trainer_class: type,
    worker: Worker,
    transformers: ModuleType,
    groups: list[list[int]] | None,  # the examples of each batch; None leaves batches to the trainer
) -> type:
    """The trainer, which reports each step to the worker and stops when told to."""

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
            # Padding does not count; a padding-free batch has positions instead of a mask.
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


if __name__ == "__main__":
    main()
