"""Counts the live tensor bytes on the CPU at every operation of real code, to check memory plans."""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.linear_log_prob import _log_prob, _log_prob_backward, _nll
from kernels.row_log_prob import scale_in_place

# Our operators are single operations to torch; these are entered, so that their inner tensors count.
_OPERATORS = {operator._opoverload: operator._init_fn for operator in (_log_prob, _log_prob_backward, _nll, scale_in_place)}


class LiveBytes(TorchDispatchMode):
    """Counts the live storages of tensors that operations return. peak: the most at once, in bytes."""

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._see(existing)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in _OPERATORS:
            with self:
                return _OPERATORS[function](*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        self._see(tree_leaves(result))
        return result

    def _see(self, values) -> None:
        for value in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                # A new storage may have the address of a dead one.
                known = self._storages.get(storage._cdata)
                if known is None or known[0].expired():
                    self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {at: known for at, known in self._storages.items() if not known[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
