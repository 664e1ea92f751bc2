"""TRL's preference trainer (DPO): the reference in each step or computed beforehand, a step's pairs at once or one by one."""

import time

from steps import Steps
from trainer import arguments, dealt, measured, tokenizer
from worker import Worker, cpu_seconds


def main() -> None:
    worker = Worker()
    trl, transformers, datasets = worker.need("trl", "transformers", "datasets")
    steps, beforehand = Steps(worker.job["steps_file"]), worker.job["mode"] != "in_loop"
    pairs = [list(zip(every[0::2], every[1::2], strict=True)) for every in map(steps.documents, range(len(steps)))]
    dataset = datasets.Dataset.from_list([
        {
            "prompt_ids": chosen.ids[: chosen.prompt], "chosen_ids": chosen.ids[chosen.prompt :],
            "rejected_ids": rejected.ids[rejected.prompt :],
        } for step in pairs for chosen, rejected in step
    ])  # fmt: skip
    numbers = iter(range(len(dataset)))
    groups = [[next(numbers) for _ in step] for step in pairs]
    parts = len(groups[0]) if worker.job["mode"] == "accumulated" else 1
    settings = trl.DPOConfig(
        **arguments(worker, len(steps)), max_length=None, beta=worker.job["beta"], precompute_ref_log_probs=beforehand,
        per_device_train_batch_size=len(groups[0]) // parts, gradient_accumulation_steps=parts,
    )  # fmt: skip
    spent = {"seconds": 0.0, "cpu_seconds": 0.0}

    class Tokenised(trl.DPOTrainer):  # type: ignore[name-defined]
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _precompute_ref_logps(self, *args):
            start = (time.perf_counter(), cpu_seconds())
            result = super()._precompute_ref_logps(*args)
            spent["seconds"] += time.perf_counter() - start[0]
            spent["cpu_seconds"] += cpu_seconds() - start[1]
            return result

    batches = [batch for group in groups for batch in dealt(group, parts)]
    trainer = measured(Tokenised, worker, transformers, batches)(
        model=worker.job["weights"], args=settings, train_dataset=dataset, processing_class=tokenizer(transformers)
    )
    worker.ready(**({"reference": spent} if beforehand else {}))
    trainer.train()


if __name__ == "__main__":
    main()
