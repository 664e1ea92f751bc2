"""What an evaluation has computed so far, pack by pack, in a journal: a killed evaluation goes on from it.

Packs depend on the requests alone, so the same command plans the same packs again. The first line says which evaluation the
journal belongs to; each kind of request has a line with the hash of its plan, then a line for each pack that is done.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from engine.inference.journal import Journal


class Results(Protocol):
    """Where an evaluation's results are kept, pack by pack; `Ledger` explains the methods."""

    def plan(self, kind: str, requests: Iterable[Any], packs: int) -> Mapping[int, Any]: ...

    def add(self, kind: str, pack: int, results: Any) -> None: ...

    def results(self, kind: str) -> Iterator[Any]: ...


class Ledger:
    """The journal of one evaluation. A context manager; one process at a time."""

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        """Open or begin the journal.

        Args: identity: what the results depend on beside the requests: model, tokenizer, numerics.
        Raises: ValueError naming the journal where it belongs to another evaluation, or has a damaged line; BlockingIOError
            where another process evaluates into the folder.
        """
        self._journal = Journal(path)
        self._plans: dict[str, str] = {}
        self._done: dict[str, dict[int, Any]] = {}
        try:
            entries = [entry for _, entry in self._journal.entries()]
            if not entries:
                self._journal.append({"evaluation": identity})
            elif entries[0] != {"evaluation": identity}:
                before = entries[0].get("evaluation", {})
                changed = [name for name in identity if identity[name] != before.get(name)]
                raise ValueError(
                    f"{path}: belongs to an evaluation with another {', '.join(changed) or 'form'}; name another --out, or "
                    "remove the folder"
                )
            for entry in entries[1:]:
                if "plan" in entry:
                    self._plans[entry["plan"]] = entry["sha256"]
                else:
                    self._done.setdefault(entry["kind"], {})[entry["pack"]] = entry["results"]
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def plan(self, kind: str, requests: Iterable[Any], packs: int) -> dict[int, Any]:
        """Begin or go on with a kind of request. Returns: the results of the packs that are done, by number.

        Raises: ValueError where the journal has other requests of this kind.
        """
        digest = hashlib.sha256(f"{packs}\n".encode())
        for request in requests:
            digest.update(json.dumps(request, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n")
        found = digest.hexdigest()
        if kind not in self._plans:
            self._journal.append({"plan": kind, "sha256": found})
            self._plans[kind] = found
        if self._plans[kind] != found:
            raise ValueError(
                f"{self._journal.path}: belongs to an evaluation of other tasks, or with another limit; name another --out, or "
                "remove the folder"
            )
        return self._done.setdefault(kind, {})

    def add(self, kind: str, pack: int, results: Any) -> None:
        """Keep the results of a pack; they are on the disk when this returns."""
        self._journal.append({"kind": kind, "pack": pack, "results": results})
        self._done[kind][pack] = results

    def results(self, kind: str) -> Iterator[Any]:
        """The results of all packs, in the packs' order."""
        for _, results in sorted(self._done[kind].items()):
            yield from results
