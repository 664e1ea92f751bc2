"""Not a test: measures the memory that saving a checkpoint takes, in a process of its own.

    python -m tests.engine.checkpoint.saving_memory OUT TOKENIZER_FOLDER

Files hold at most FILE_BYTES. Prints the bytes of the saved tensors, and the growth of anonymous memory to its peak.
"""

import os
import sys
import threading
from pathlib import Path

import torch

import engine.checkpoint.writing
from engine.checkpoint.state import TrainingState
from engine.checkpoint.writing import Checkpointer
from engine.distributed.ranks import Ranks
from engine.optim.adamw import AdamW
from engine.settings.sections import OptimizerSettings
from model.config import MistralConfig
from model.mistral import Mistral
from model.vocabulary.tokenizer import Tokenizer

FILE_BYTES = 2**22
CONFIG = MistralConfig(
    vocab_size=512,
    unpadded_vocab_size=512,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)


def allocated() -> int:
    """Bytes of anonymous memory that this process holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """Watches `allocated` until it is told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self.bytes = allocated()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, allocated())

    def stop(self) -> int:
        """Returns: bytes above the amount before."""
        self._done.set()
        self.join()
        return self.bytes - self.before


def main() -> None:
    out, tokenizer = Path(sys.argv[1]), Tokenizer.load(sys.argv[2])
    torch.set_num_threads(1)
    os.fsync = lambda handle: None
    engine.checkpoint.writing.MAX_SHARD_BYTES = FILE_BYTES
    model = Mistral(CONFIG)
    optimizer = AdamW(model.named_parameters(), OptimizerSettings())
    tensors = [*model.parameters(), *optimizer.state.values()]
    for tensor in tensors:
        tensor.data.fill_(1.0)
    above = 0
    with Checkpointer(out, model, optimizer, tokenizer, Ranks(torch.device("cpu")), keep=1) as checkpointer:
        # The first save also allocates memory that libraries keep.
        for step in (1, 2):
            peak = Peak()
            peak.start()
            checkpointer.save(TrainingState(step, {}, ""))
            checkpointer.wait()
            above = peak.stop()
    print(sum(tensor.nbytes for tensor in tensors), above)


if __name__ == "__main__":
    main()
