"""Figures by matplotlib, an optional dependency (extra `quickstart`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from model.folder import complete_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure | None:
    """An empty figure, sizes in inches. Without matplotlib: None, after one line on standard error."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no drawing: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's suffix names; the file appears when complete, with the same bytes each time.

    Raises: ValueError for a suffix that matplotlib cannot write.
    """
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "komainu", "svg.fonttype": "none"}), complete_file(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."), dpi=100, metadata=metadata)
