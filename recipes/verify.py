"""Check that checkpoints are whole: every file present and as written, every tensor in its shape, no pickle.

    python -m recipes.verify runs/sft/step-00000100
    python -m recipes.verify runs/sft                 all complete checkpoints of a run

Each checkpoint gets one line, and each problem one line that names the file. Exit status: 0 without problems, else 1.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path


def verify(folder: Path) -> bool:
    """Print the problems of a checkpoint; returns whether it is whole."""
    from engine.checkpoint.verifying import problems

    found = list(problems(folder))
    for problem in found:
        print(f"error: {problem}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{folder}: {f'{len(found)} problems' if found else 'whole'}, {len(files)} files, {size:,.1f} MiB")
    return not found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m recipes.verify", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, help="checkpoint (step-...), or run folder (all its checkpoints)")
    chosen = parser.parse_args(argv).checkpoint.expanduser()
    from engine.checkpoint.state import STATE, checkpoints

    if not chosen.is_dir():
        raise SystemExit(f"error: {chosen}: no such folder")
    found = checkpoints(chosen) or [chosen]
    if found == [chosen] and not (chosen / STATE).parent.is_dir():
        raise SystemExit(f"error: {chosen}: is neither a checkpoint nor a run folder that holds one")
    whole = [verify(folder) for folder in found]
    if not all(whole):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
