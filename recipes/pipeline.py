"""A whole chain of recipes by one command: vocabulary, preparation, training, evaluation, export.

    python -m recipes.pipeline recipes/shisa/pipeline.toml --dry-run
    python -m recipes.pipeline recipes/shisa/pipeline.toml --sft.pack-tokens 8192
    torchrun --standalone --nproc-per-node 8 --max-restarts 3 --shutdown-timeout 600 -m recipes.pipeline CHAIN.toml

The same command again goes on where the chain was stopped or killed. A finished stage is not made twice; where its settings or
what it read have changed, the chain says so and stops. `--STAGE.KEY VALUE` is `--KEY VALUE` on the command line of that stage.
Under torchrun all ranks train; the other stages run on rank 0 while the others wait.
"""

import dataclasses
import gc
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Annotated, Any, Literal

from engine.settings.toml import PathName, option
from recipes.chain.stages import Chain, Stage, StageSettings, read_chain
from recipes.command import command

PROG = "python -m recipes.pipeline"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """A chain of recipes. --STAGE.KEY VALUE overrides a setting of a stage."""

    root: PathName
    """Folder in which the paths of the stages' files begin; its `pipeline/` holds the chain's markers."""
    stages: tuple[StageSettings, ...]
    """What to run, in this order."""
    out: PathName = ""
    """Folder to work in instead of `root`: every path of the stages in `root` moves there."""
    from_: Annotated[tuple[str, ...], option("from")] = ()
    """Make these stages again, and all that depends on them; earlier results are kept beside the new ones, as NAME.old."""
    only: tuple[str, ...] = ()
    """Run these stages alone, on what the earlier stages have made."""
    dry_run: bool = False
    """Check everything and start nothing: settings, paths, sizes, disk, memory of each training, access to the hub."""
    gpu: Literal["", "h200", "h100"] = ""
    """Dry run: plan the memory for this kind of GPU; default: this machine."""
    gpus: int = 0
    """Dry run: plan for this number of GPUs; default: as many processes as this run has."""

    def __post_init__(self) -> None:
        if self.gpus < 0:
            raise ValueError(f"gpus = {self.gpus}: must be at least 1; 0 for the processes of this run")

    @property
    def folder(self) -> str:
        return self.out or self.root


def run(
    settings: PipelineSettings,
    options: Mapping[str, Sequence[str]] | None = None,  # stage -> further options of its command line
    start: str = PROG,  # the command that starts this chain, for what is said to the user
) -> dict[str, float]:
    """Run the chain, or check it. Returns: the seconds of each finished stage.

    Raises: ValueError naming every mistake before anything starts, or the stale stages; what a stage raises. SystemExit with
        the status of a training stage that a signal stopped.
    """
    if settings.out:
        start = f"{start} --out {shlex.quote(settings.out)}"
    chain, mistakes = read_chain(settings.stages, root=settings.root, out=settings.folder, options=options or {})
    if not mistakes:
        chain.called([*settings.from_], "--from")
        chain.called([*settings.only], "--only")
    if settings.dry_run:
        from recipes.chain.checking import check

        check(chain, settings, mistakes, start)
        return {}
    if mistakes:
        raise ValueError("\n".join(mistakes))
    from engine.distributed.waiting import Waiting

    waiting = Waiting()
    with ExitStack() as stack:
        stack.enter_context(_terminated())
        runner = _Runner(chain, settings, waiting.main, start)
        waiting.main_alone(lambda: runner.open(stack))
        for stage in runner.todo:
            if waiting.main_alone(partial(runner.is_finished, stage)):
                continue
            with runner.announced(stage):
                waiting.main_alone(partial(runner.begin, stage))
                if stage.trains:
                    stage.recipe.run(stage.settings)
                else:
                    waiting.main_alone(partial(runner.run_alone, stage))
                waiting.main_alone(partial(runner.finish, stage))
            _free_memory()
        seconds: dict[str, float] = waiting.main_alone(runner.close)
    waiting.leave()
    return seconds


class _Runner:
    """What the chain does around its stages. On the other ranks it only prints nothing."""

    def __init__(self, chain: Chain, settings: PipelineSettings, main: bool, start: str) -> None:
        self.chain, self._settings, self._main, self._start = chain, settings, main, start
        self.todo = chain.called(settings.only, "--only") if settings.only else list(chain.stages)
        self._began = 0.0

    def open(self, stack: ExitStack) -> None:
        """Hold the chain's folder, and refuse a chain that cannot run or would use a stale result."""
        from engine.distributed.run_lock import run_lock
        from engine.inputs import check_writable
        from recipes.chain.markers import Markers
        from recipes.chain.wiring import wiring_mistakes

        check_writable(self.chain.folder, "out")
        self.chain.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(run_lock(self.chain.folder))
        self.markers = Markers(self.chain)
        # torchrun starts its workers again with the same command line: what is made again is made again once.
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            for stage in self.chain.depending(self._settings.from_):
                self.markers.discard(stage)
        if mistakes := wiring_mistakes(self.chain, self.markers, self.todo):
            raise ValueError("\n".join(mistakes))
        self._judge()

    def _judge(self) -> dict[str, Any]:
        """The verdicts by stage. Raises: ValueError where a stage that matters now is stale."""
        from recipes.chain.staleness import judge, refusal

        verdicts = judge(self.chain, self.markers, self.todo)
        matter = self.chain.needed(self.todo)
        if said := refusal([verdict for verdict in verdicts if verdict.stage in matter], self._start):
            raise ValueError(said)
        return {verdict.stage.name: verdict for verdict in verdicts}

    def is_finished(self, stage: Stage) -> bool:
        """Whether there is nothing to do for a stage; says so."""
        verdict = self._judge()[stage.name]
        if verdict.state != "finished":
            return False
        print(f"{self._place(stage)}: finished already" + "".join(f" ({remark})" for remark in verdict.remarks), flush=True)
        return True

    @contextmanager
    def announced(self, stage: Stage) -> Iterator[None]:
        """Print a line before and after a stage, and keep the seconds of one that does not end."""
        if self._main:
            print(f"\n{self._place(stage)}: {stage.command}", flush=True)
        self._began = time.monotonic()
        try:
            yield
        except BaseException:
            if self._main:
                with suppress(OSError):
                    self.markers.interrupt(stage, self._began)
                print(f"{self._place(stage)}: not finished; the same command goes on from here", file=sys.stderr, flush=True)
            raise
        if self._main:
            print(f"{self._place(stage)}: done in {time.monotonic() - self._began:.1f} s", flush=True)

    def _place(self, stage: Stage) -> str:
        return f"[{self.chain.stages.index(stage) + 1}/{len(self.chain.stages)}] {stage.name}"

    def begin(self, stage: Stage) -> None:
        self.markers.begin(stage)

    def run_alone(self, stage: Stage) -> None:
        """Run a stage that does not train."""
        marker, settings = self.markers.of(stage), stage.settings
        if marker is not None and not marker.existed and hasattr(settings, "overwrite"):
            # What lies there is this stage's own, from a start that was killed before its marker said that it was done.
            settings = dataclasses.replace(settings, overwrite=True)
        stage.recipe.run(settings)

    def finish(self, stage: Stage) -> None:
        self.markers.finish(stage, self._began)

    def close(self) -> dict[str, float]:
        """Print the table of all stages. Returns: the seconds of each."""
        seconds = {stage.name: marker.seconds for stage in self.chain.stages if (marker := self.markers.of(stage))}
        width = max(map(len, seconds), default=0)
        print(f"\n{'stage':<{width}}{'seconds':>12}  results")
        for stage in self.chain.stages:
            if stage.name in seconds:
                print(f"{stage.name:<{width}}{seconds[stage.name]:>12,.1f}  {', '.join(stage.outputs.values())}")
        print(f"{'all':<{width}}{sum(seconds.values()):>12,.1f}", flush=True)
        return seconds


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends a stage that does not handle it by an exception, so that locks and half-written folders are removed."""

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_memory() -> None:
    """Give back what a stage held, before the next one asks for memory."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def split_options(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """(the chain's own arguments, the options of each stage) of a command line: `--sft.steps 20` is sft's `--steps 20`."""
    own: list[str] = []
    options: dict[str, list[str]] = {}
    current = own
    for argument in arguments:
        name, dot, rest = argument.removeprefix("--").partition(".")
        if argument.startswith("--"):
            current = options.setdefault(name, []) if dot and "=" not in name else own
            current.append(f"--{rest}" if current is not own else argument)
        else:
            # The chain's own file may stand anywhere.
            (own if argument.endswith(".toml") else current).append(argument)
    return own, options


def main(argv: Sequence[str] | None = None) -> None:
    own, options = split_options(sys.argv[1:] if argv is None else argv)
    given = [f"--{name}.{part[2:]}" if part.startswith("--") else part for name, parts in options.items() for part in parts]
    start = shlex.join([*(argument for argument in own if argument.endswith(".toml")), *given])
    command(PipelineSettings, partial(run, options=options, start=f"{PROG} {start}"), own, PROG)


if __name__ == "__main__":
    main()
