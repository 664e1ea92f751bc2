"""The report of a run, or of several runs compared: one HTML page with curves, samples, spikes and settings, for any browser.

    python -m recipes.report runs/sft                              writes runs/sft/report.html
    python -m recipes.report runs/sft-a runs/sft-b --out ab.html   curves overlaid, and the settings that differ

The page needs no network. A run that is still running can be read at any time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m recipes.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder")
    parser.add_argument(
        "--out",
        metavar="FILE.html",
        type=Path,
        help="the page (default: report.html in the run folder, or\ncomparison.html in the folder that holds all runs)",
    )
    given = parser.parse_args(argv)
    from recipes.report.page import REPORT, write_report

    folders = [folder.expanduser() for folder in given.runs]
    # A comparison must not replace a run's own report.
    together = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    own = folders[0] / REPORT if len(folders) == 1 else together / "comparison.html"
    out = given.out.expanduser() if given.out else own
    if out.suffix not in (".html", ".htm"):
        raise SystemExit(f"error: --out {out}: must end in .html")
    try:
        notes = write_report(folders, out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    for note in notes:
        print(note)
    print(f"{out}: {out.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
