"""The peers that a training benchmark can measure beside ours: what each is started with, and in what it differs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.contest import PEERS, Candidate

_LOOP = ("next-token", "sft")


@dataclass(frozen=True)
class Peer:
    """script: in `benchmarks/peers`. objectives: that it can train. mode: its variant, for scripts with several."""

    script: str
    objectives: tuple[str, ...]
    mode: str = ""
    differs: tuple[str, ...] = ()


_WHOLE_HEAD = "scores every place, also those without a label"
_TRL = ("processes each document's last token too",)
_PADDED = "pads documents to the longest of the step"
RIVALS: dict[str, Peer] = {
    "transformers eager": Peer("transformers_eager.py", _LOOP, differs=(_WHOLE_HEAD,)),
    "transformers compile": Peer("transformers_compile.py", _LOOP, differs=(_WHOLE_HEAD,)),
    "transformers + Liger": Peer("transformers_liger.py", _LOOP),
    "torchtitan Llama": Peer("torchtitan_llama.py", _LOOP, differs=(_WHOLE_HEAD, "full causal attention, no sliding window")),
    "TRL SFT padded": Peer("trl_sft.py", _LOOP, "padded", (*_TRL, _PADDED)),
    "TRL SFT padding-free": Peer("trl_sft.py", _LOOP, "padding_free", _TRL),
    "TRL SFT accumulated": Peer("trl_sft.py", _LOOP, "accumulated", (*_TRL, "a micro-batch of each document")),
    "TRL SFT packed": Peer("trl_sft.py", _LOOP, "packed", (*_TRL, "composes the steps itself from the same documents")),
    "TRL DPO": Peer("trl_dpo.py", ("dpo",), "in_loop", (*_TRL, _PADDED, "a second model computes the reference in each step")),
    "TRL DPO precomputed": Peer("trl_dpo.py", ("dpo",), "precomputed", (*_TRL, _PADDED)),
    "TRL DPO accumulated": Peer("trl_dpo.py", ("dpo",), "accumulated", (*_TRL, "a micro-batch of each pair")),
}


def chosen(names: tuple[str, ...], objective: str) -> list[str]:
    """The peers of these names ("all": those that train the objective), in the table's order.

    Raises: ValueError for an unknown name, or a peer that cannot train the objective.
    """
    if "all" in names:
        return [name for name, peer in RIVALS.items() if objective in peer.objectives]
    for name in names:
        if name not in RIVALS:
            raise ValueError(f"peers: no peer is called {name!r}; there are all, {', '.join(RIVALS)}")
        if objective not in RIVALS[name].objectives:
            raise ValueError(f"peers: {name} does not train the objective {objective}; leave it out")
    return [name for name in RIVALS if name in names]


def candidates(
    names: list[str],
    job: Mapping[str, Any],
    *,
    python: str,
) -> list[Candidate]:
    """The peers as candidates for a contest."""
    found = []
    for name in names:
        peer = RIVALS[name]
        differs = list(peer.differs)
        if "torchtitan" not in peer.script:
            differs.append("attention by scaled_dot_product_attention, under a dense mask where documents are packed or padded")
        if job["dtype"] != "float32":
            differs.append("no float32 masters of the parameters")
        if job["config"]["vocab_size"] > job["config"]["unpadded_vocab_size"]:
            differs.append("gives the padding rows of the vocabulary a probability")
        settings = {**job, "mode": peer.mode}
        found.append(Candidate(name, (str(PEERS / peer.script),), settings, tuple(differs), python))
    return found
