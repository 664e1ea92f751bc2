"""The steps of a run, made ahead in a background thread and copied to the device while it computes."""

import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass, fields, replace

import torch

from engine.data.batch import Packing, Step, make_step
from engine.data.plan import Plan
from kernels.attention.work import AttentionWork


def step_stream(
    plan: Plan,
    start: int,
    packing: Packing,
    *,
    device: torch.device | None = None,
    prefetch: int = 2,
) -> Generator[Step, None, None]:
    """`make_step` for steps `start` to the plan's last, up to `prefetch` steps ahead.

    Args: device: a CUDA device gets its steps by copies from pinned memory on a stream of their own, so that neither the host
        nor the device waits for them.
    Raises: an exception of the thread, at the step that it belongs to. Closing the generator ends the thread.
    """
    ready: queue.Queue[_Prefetched | BaseException | None] = queue.Queue(maxsize=max(1, prefetch))
    closed = threading.Event()

    def put(item: _Prefetched | BaseException | None) -> None:
        # A put without a timeout would wait forever for a consumer that has left.
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                pass

    def work() -> None:
        try:
            copies = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None
            for step in range(start, plan.steps):
                if closed.is_set():
                    return
                for dataset in plan.datasets:
                    dataset.check_unchanged()
                made = make_step(plan, step, packing)
                put(_Prefetched(made) if copies is None else _copied(made, copies))
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="step_stream", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item.arrived()
    finally:
        closed.set()
        thread.join()


@dataclass(frozen=True, eq=False)
class _Prefetched:
    """A step, and the event after its copies to the device, if there were any."""

    step: Step
    copied: torch.cuda.Event | None = None

    def arrived(self) -> Step:
        """The step, safe to use on the current stream: the stream waits for the copies, the host does not."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.step.batches[0].tokens_T.device)
            stream.wait_event(self.copied)
            for batch in self.step.batches:
                # The copying stream owns this memory, and would reuse it while the current stream still computes with it.
                for part in (getattr(batch, field.name) for field in fields(batch)):
                    if part is not None:
                        (part.work if isinstance(part, AttentionWork) else part).record_stream(stream)
        return self.step


def _copied(step: Step, stream: torch.cuda.Stream) -> _Prefetched:
    """Start copying a step to the stream's device."""
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        on_device = replace(step, batches=[batch.to(stream.device) for batch in step.batches])
        copied = torch.cuda.Event()
        copied.record(stream)
    return _Prefetched(on_device, copied)
