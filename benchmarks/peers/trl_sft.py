"""TRL's supervised fine-tuning trainer: padded, padding-free, accumulated, or packed (best-fit decreasing, its default).

Padded and padding-free steps are one batch of the very documents of ours; accumulated goes through them one by one. Packed, TRL
composes the steps itself from the same documents: as many rows of the longest document's length as come nearest to the tokens
of a step of ours.
"""

from steps import IGNORED, Steps
from trainer import arguments, dealt, measured, tokenizer
from worker import Worker


def main() -> None:
    worker = Worker()
    trl, transformers, datasets = worker.need("trl", "transformers", "datasets")
    steps, mode = Steps(worker.job["steps_file"]), worker.job["mode"]
    documents = [steps.documents(step) for step in range(len(steps))]
    dataset = datasets.Dataset.from_list([
        {"input_ids": one.ids, "labels": [id if on else IGNORED for id, on in zip(one.ids, one.trained, strict=True)]}
        for step in documents for one in step
    ])  # fmt: skip
    tokens = sum(len(one.ids) for step in documents for one in step)
    numbers = iter(range(len(dataset)))
    groups = [[next(numbers) for _ in step] for step in documents]
    packed, parts = mode == "packed", min(map(len, groups)) if mode == "accumulated" else 1
    settings = trl.SFTConfig(
        **arguments(worker, len(steps)),
        max_length=steps.longest if packed else None,
        packing=packed,
        padding_free=mode == "padding_free",
        per_device_train_batch_size=max(1, round(tokens / len(steps) / steps.longest)) if packed else 1,
        gradient_accumulation_steps=parts,
    )
    batches = None if packed else [batch for group in groups for batch in dealt(group, parts)]
    trainer = measured(trl.SFTTrainer, worker, transformers, batches)(
        model=worker.job["weights"], args=settings, train_dataset=dataset, processing_class=tokenizer(transformers)
    )
    worker.ready()
    trainer.train()


if __name__ == "__main__":
    main()
