"""transformers with torch.compile, in a plain loop on packed rows. Compiling happens in the warm-up."""

import torch
from packed import load, train
from worker import Worker


def main() -> None:
    worker = Worker()
    (transformers,) = worker.need("transformers")
    train(worker, torch.compile(load(worker, transformers)))


if __name__ == "__main__":
    main()
