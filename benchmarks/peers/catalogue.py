"""The peers of whole training steps: the script that trains each, what it can train, and how it differs from ours."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.candidates import Candidate

SCRIPTS = Path(__file__).parent
_TEXT = ("next-token", "sft")


@dataclass(frozen=True)
class Peer:
    script: str  # beside this file
    mode: str  # the script's variant
    objectives: tuple[str, ...]  # that it can train
    differs: tuple[str, ...] = ()


_WHOLE_HEAD = "scores every place, also those without a label"
_LAST_TOKEN = "processes each document's last token too"
_PADDED = "pads documents to the longest of the step"
PEERS: dict[str, Peer] = {
    "transformers eager": Peer("transformers_loop.py", "eager", _TEXT, (_WHOLE_HEAD,)),
    "transformers compile": Peer("transformers_loop.py", "compile", _TEXT, (_WHOLE_HEAD,)),
    "transformers + Liger": Peer("transformers_loop.py", "liger", _TEXT),
    "torchtitan Llama": Peer("torchtitan_llama.py", "", _TEXT, (_WHOLE_HEAD, "full causal attention, no sliding window")),
    "TRL SFT padded": Peer("trl_trainers.py", "padded", _TEXT, (_LAST_TOKEN, _PADDED)),
    "TRL SFT padding-free": Peer("trl_trainers.py", "padding_free", _TEXT, (_LAST_TOKEN,)),
    "TRL SFT accumulated": Peer("trl_trainers.py", "accumulated", _TEXT, (_LAST_TOKEN, "a micro-batch of each document")),
    "TRL SFT packed": Peer("trl_trainers.py", "packed", _TEXT, (_LAST_TOKEN, "composes steps itself from the same documents")),
    "TRL DPO": Peer("trl_trainers.py", "in_loop", ("dpo",), (_LAST_TOKEN, _PADDED, "the reference runs in each step")),
    "TRL DPO precomputed": Peer("trl_trainers.py", "precomputed", ("dpo",), (_LAST_TOKEN, _PADDED)),
    "TRL DPO accumulated": Peer("trl_trainers.py", "accumulated", ("dpo",), (_LAST_TOKEN, "a micro-batch of each pair")),
}


def chosen(
    names: Sequence[str],  # "all" for all that train the objective
    objective: str,
) -> list[str]:
    """The named peers in the table's order. Raises: ValueError for a peer that is unknown or cannot train the objective."""
    if "all" in names:
        return [name for name, peer in PEERS.items() if objective in peer.objectives]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peers: no peer is called {name!r}; choose from all, {', '.join(PEERS)}")
        if objective not in PEERS[name].objectives:
            raise ValueError(f"peers: {name} does not train the objective {objective}; leave it out")
    return [name for name in PEERS if name in names]


def candidates(
    names: Sequence[str],
    job: Mapping[str, Any],
    python: str = "",  # interpreter; empty: this one
) -> list[Candidate]:
    # Peers run in another folder, where a relative path would name nothing; a link stays, as it tells Python its environment.
    interpreter = str(Path(shutil.which(python) or python).absolute()) if python else sys.executable
    found = []
    for name in names:
        peer = PEERS[name]
        differs = list(peer.differs)
        if peer.script != "torchtitan_llama.py":
            differs.append("attention by scaled_dot_product_attention, under a dense mask where documents are packed or padded")
        if job["dtype"] != "float32":
            differs.append("no float32 masters of the parameters")
        if job["config"]["vocab_size"] > job["config"]["unpadded_vocab_size"]:
            differs.append("gives the padding rows of the vocabulary a probability")
        arguments = (str(SCRIPTS / peer.script),)
        found.append(Candidate(name, arguments, {**job, "mode": peer.mode}, tuple(differs), interpreter))
    return found
