"""Power and clock of a GPU while something runs on it, through NVML."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from benchmarks.measure import spread

_INTERVAL_SECONDS = 0.1


class Sampler:
    """Samples the GPU that the environment makes first. `missing`: why it cannot, None where it can."""

    def __init__(self) -> None:
        self.missing: str | None = None
        try:
            import pynvml
        except ImportError:
            self.missing = "nvidia-ml-py is not installed"
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
            self._device = (
                pynvml.nvmlDeviceGetHandleByIndex(int(first)) if first.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(first)
            )
        except pynvml.NVMLError as error:
            self.missing = f"NVML: {error}"

    @contextlib.contextmanager
    def watch(self) -> Iterator[dict[str, Any]]:
        """Yields what is filled with "watts" and "clock_mhz" samples when the block ends; left empty where there is no NVML."""
        seen: dict[str, Any] = {}
        if self.missing:
            yield seen
            return
        stop, watts, clocks = threading.Event(), [], []

        def sample() -> None:
            while not stop.is_set():
                with contextlib.suppress(self._nvml.NVMLError):
                    watts.append(self._nvml.nvmlDeviceGetPowerUsage(self._device) / 1e3)
                    clocks.append(float(self._nvml.nvmlDeviceGetClockInfo(self._device, self._nvml.NVML_CLOCK_SM)))
                stop.wait(_INTERVAL_SECONDS)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            stop.set()
            thread.join()
            seen.update(watts=watts, clock_mhz=clocks)

    def summary(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """Spread of power (W) and of the multiprocessors' clock (MHz) over measured rounds."""
        if self.missing:
            return {"watts": {"missing": self.missing}, "clock_mhz": {"missing": self.missing}}
        samples = {name: [value for seen in rounds for value in seen.get(name, [])] for name in ("watts", "clock_mhz")}
        return {name: spread(values) if values else {"missing": "no sample"} for name, values in samples.items()}
