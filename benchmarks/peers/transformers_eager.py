"""transformers as it is, in a plain loop on packed rows."""

from packed import load, train
from worker import Worker


def main() -> None:
    worker = Worker()
    (transformers,) = worker.need("transformers")
    train(worker, load(worker, transformers))


if __name__ == "__main__":
    main()
