"""transformers with Liger-Kernel's operators and its fused head, in a plain loop on packed rows."""

import os

from packed import load, train
from worker import Worker


def main() -> None:
    worker = Worker()
    _, transformers = worker.need("liger_kernel", "transformers")
    if worker.device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        worker.missing("Liger-Kernel needs a GPU")
    (liger,) = worker.need("liger_kernel.transformers")
    model = load(worker, transformers)
    liger.apply_liger_kernel_to_mistral(model=model)
    train(worker, model)


if __name__ == "__main__":
    main()
