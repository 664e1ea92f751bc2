"""Runs a Gluon kernel of Hopper on a CPU, from its own source: warps as threads, tensors as numpy arrays.

Every function of the kernel runs as Python, where the names of Gluon mean what stands here. Whatever Hopper may do at any later
time is done as late as a wait allows, or in a random order. Copies by TMA arrive in random order, and their target holds NaN
until then; a product reads its factors when somebody waits for it. A slot that is freed or read too early thus shows as NaN.

Raises: Stuck where partitions wait for one another, AssertionError for a product whose result is read before its wait, for
stores to shared memory that a product could miss, and for arrivals that a barrier does not expect.
"""

import random
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from triton.language import constexpr
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

# Seconds that a partition waits before it counts as stuck.
PATIENCE = 20.0


class Stuck(Exception):
    """A partition waits for what never comes."""


class Array(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype: Any) -> "Array":
        return self.astype(dtype).view(Array)


def array(values: Any) -> Array:
    return np.asarray(values).view(Array)


class Pointer:
    """An element of a tensor in global memory, or an array of its elements."""

    def __init__(self, memory: np.ndarray, at: Any = 0) -> None:
        self.memory, self.at = memory, at

    def __add__(self, distance: Any) -> "Pointer":
        return Pointer(self.memory, self.at + distance)


class Shared:
    """A tensor in shared memory, or a view of it."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def index(self, number: int) -> "Shared":
        return Shared(self.values[number])

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.values.transpose(order))

    def slice(self, start: int, length: int) -> "Shared":
        return Shared(self.values[start : start + length])

    def load(self, layout: Any) -> Array:
        return array(self.values.copy())

    def store(self, values: Array) -> None:
        self.values[...] = values
        own.unfenced = True


class Barrier:
    """An mbarrier: a phase is over after `count` arrivals and all expected bytes."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0


class Barriers:
    def __init__(self, number: int) -> None:
        self.barriers = [Barrier() for _ in range(number)]

    def index(self, number: int) -> Barrier:
        return self.barriers[number]


class Descriptor:
    """A tensor map of a matrix, read in boxes."""

    def __init__(self, matrix: torch.Tensor, box: tuple[int, int]) -> None:
        self.values, self.box, self.layout = matrix.numpy(), box, None
        self.dtype = self.values.dtype
        self.block_type = types.SimpleNamespace(nbytes=box[0] * box[1] * self.dtype.itemsize)

    def read(self, at: Sequence[int]) -> np.ndarray:
        """A box, with zeros outside of the matrix."""
        found = np.zeros(self.box, self.dtype)
        first, last = max(at[0], 0), min(at[0] + self.box[0], len(self.values))
        if first < last:
            found[first - at[0] : last - at[0]] = self.values[first:last, at[1] : at[1] + self.box[1]]
        return found


class Product:
    """A product that has been started."""

    def __init__(self, left: Any, right: Shared, sums: Any) -> None:
        self.left, self.right, self.sums, self.result = left, right, sums, None

    def finish(self) -> None:
        left = self.left.values if isinstance(self.left, Shared) else self.left
        self.result = array(self.sums + left.astype(np.float32) @ self.right.values.astype(np.float32))


class Own(threading.local):
    """What belongs to one partition."""

    unfenced = False

    def __init__(self) -> None:
        self.products: list[Product] = []


own = Own()


class Chip:
    """A multiprocessor, which runs one program at a time."""

    def __init__(self, seed: int) -> None:
        self.changed = threading.Condition()
        self.draw = random.Random(seed)
        self.program = 0
        self.copies: list[tuple[Descriptor, list[int], Barrier, Shared]] = []
        self.failures: list[BaseException] = []
        self.done = False

    # Barriers and copies.

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def _settle(self, barrier: Barrier) -> None:
        assert barrier.missing >= 0, "more arrivals than the barrier expects"
        if not barrier.missing and not barrier.bytes:
            barrier.phase, barrier.missing = barrier.phase + 1, barrier.count
        self.changed.notify_all()

    def arrive(self, barrier: Barrier, count: int) -> None:
        assert not own.unfenced, "a slot was stored to, and freed without a fence"
        with self.changed:
            barrier.missing -= count
            self._settle(barrier)

    def expect(self, barrier: Barrier, size: int) -> None:
        with self.changed:
            barrier.bytes += size
            barrier.missing -= 1
            self._settle(barrier)

    def wait(self, barrier: Barrier, parity: int) -> None:
        with self.changed:
            over = self.changed.wait_for(lambda: self.failures or barrier.phase % 2 != parity, PATIENCE)
        if not over or self.failures:
            raise Stuck(f"no end of a phase of parity {parity}")

    def load_tile(self, descriptor: Descriptor, at: list[int], barrier: Barrier, target: Shared) -> None:
        target.values[...] = np.nan
        with self.changed:
            self.copies.append((descriptor, at, barrier, target))
            self.changed.notify_all()

    def _copy(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.copies or self.done)
                if not self.copies:
                    return
                descriptor, at, barrier, target = self.copies.pop(self.draw.randrange(len(self.copies)))
                target.values[...] = descriptor.read(at)
                barrier.bytes -= descriptor.block_type.nbytes
                self._settle(barrier)

    # Partitions.

    def warp_specialize(self, partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, registers: Any):
        def run(function: Callable[..., None], arguments: tuple[Any, ...] = ()) -> None:
            try:
                with np.errstate(all="ignore"):
                    function(*arguments)
                assert not own.products, "a partition ends with products in flight"
            except BaseException as failure:
                with self.changed:
                    self.failures.append(failure)
                    self.changed.notify_all()

        threads = [threading.Thread(target=run, args=partition) for partition in partitions]
        self.draw.shuffle(threads)
        copier = threading.Thread(target=run, args=(self._copy,))
        for thread in [copier, *threads]:
            thread.start()
        for thread in threads:
            thread.join()
        with self.changed:
            self.done = True
            self.changed.notify_all()
        copier.join()
        self.done = False
        if self.failures:
            raise self.failures[0]

    # Products.

    def warpgroup_mma(self, left: Any, right: Shared, sums: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
        assert not own.unfenced, "a product could miss stores before it"
        product = Product(left, right, sums if use_acc else 0)
        own.products.append(product)
        return product if is_async else self.warpgroup_mma_wait(0, deps=(product,))

    def warpgroup_mma_wait(self, outstanding: int, deps: tuple[Product]) -> Array:
        while len(own.products) > outstanding:
            own.products.pop(0).finish()
        assert deps[0].result is not None, "a result is read while its product may be in flight"
        return deps[0].result

    def fence(self) -> None:
        own.unfenced = False


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    found = pointer.memory[pointer.at]
    return int(found) if isinstance(found, np.integer) else array(found)


def store(pointer: Pointer, values: Array, mask: Array) -> None:
    places, mask, values = np.broadcast_arrays(pointer.at, mask, values)
    pointer.memory[places[mask]] = values[mask]


def _names(chip: Chip) -> dict[str, Any]:
    """What the names in a kernel's source mean here."""

    def layout(*arguments: Any) -> None:
        return None

    def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Shared | Barriers:
        return Barriers(shape[0]) if dtype is np.int64 else Shared(np.full(shape, np.nan, dtype))

    language = types.SimpleNamespace(
        int64=np.int64,
        float32=np.float32,
        constexpr=constexpr,
        program_id=lambda axis: chip.program,
        allocate_shared_memory=allocate,
        warp_specialize=chip.warp_specialize,
        static_range=range,
        NVMMADistributedLayout=layout,
        DotOperandLayout=layout,
        SliceLayout=layout,
        BlockedLayout=layout,
        convert_layout=lambda values, layout: values,
        arange=lambda first, end, layout: array(np.arange(first, end)),
        zeros=lambda shape, dtype, layout: array(np.zeros(shape, dtype)),
        full=lambda shape, value, dtype, layout: array(np.full(shape, value, dtype)),
        where=lambda mask, one, other: array(np.where(mask, one, other)),
        cast=lambda value, dtype: dtype(value),
        load=load,
        store=store,
        cdiv=lambda number, divisor: -(-number // divisor),
        maximum=lambda one, other: max(one, other) if isinstance(one, int) else np.maximum(one, other),
        minimum=lambda one, other: min(one, other) if isinstance(one, int) else np.minimum(one, other),
        max=lambda values, axis: np.max(values, axis),
        sum=lambda values, axis: np.sum(values, axis),
        exp2=np.exp2,
        log2=np.log2,
    )
    barriers = types.SimpleNamespace(
        MBarrierLayout=layout, init=chip.init, arrive=chip.arrive, expect=chip.expect, wait=chip.wait
    )
    return {
        "gl": language,
        "tl": language,
        "mbarrier": barriers,
        "load_tile": chip.load_tile,
        "warpgroup_mma": chip.warpgroup_mma,
        "warpgroup_mma_wait": chip.warpgroup_mma_wait,
        "fence_async_shared": chip.fence,
    }


def on_cpu(module: types.ModuleType, kernel: str, programs: int, *arguments: Any, seed: int = 0, **constants: Any) -> None:
    """Run all programs of a kernel of `module`, one after the other.

    Args: arguments: tensors and descriptors on the CPU, and numbers. constants: the kernel's constexpr arguments.
    """
    chip = Chip(seed)
    names: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, (JITFunction, InterpretedFunction)):
            names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        elif isinstance(value, constexpr):
            names[name] = value.value
    names |= _names(chip)
    given = [Pointer(value.numpy().reshape(-1)) if isinstance(value, torch.Tensor) else value for value in arguments]
    for chip.program in range(programs):
        names[kernel](*given, **constants)
