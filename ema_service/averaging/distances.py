"""The sums of squares of one averaged section, by tensor: taken by the compiled loop, or by torch.

Knows flat tensors, of any dtype and device, and where the section's tensors end. Does not know names, or what the sums
are told as.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ema_service.averaging.squares import Sums

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Squares"]


class Squares:
    """Sums of squares of (result - parameter), parameter and result, for each tensor of one section.

    ends: behind the last element of each tensor, ascending. Thread-safe: each thread adds to sums of its own.
    """

    def __init__(self, ends: npt.NDArray[np.int64]) -> None:
        self.ends = ends
        self._sums: dict[int, Sums] = {}
        #: What torch has worked out, perhaps on a device that nobody has waited for: tensor, and its three norms.
        self._norms: list[tuple[int, Tensor]] = []

    def sums(self) -> Sums:
        """The sums that the calling thread adds to, (tensors, 3)."""
        thread = threading.get_ident()
        found = self._sums.get(thread)
        return self._sums.setdefault(thread, np.zeros((len(self.ends), 3))) if found is None else found

    def add(self, first: int, params: Tensor, results: Tensor) -> None:
        """Add a stretch of elements, from the element ``first`` on, by torch. Does not wait for a device.

        params: before they were overwritten, in the dtype of the results.
        """
        import torch

        tensor, begin = int(np.searchsorted(self.ends, first, "right")), 0
        while begin < len(results):
            stop = min(len(results), int(self.ends[tensor]) - first)
            result, param = results[begin:stop], params[begin:stop]
            if begin < stop:
                norms = [
                    torch.linalg.vector_norm(each, dtype=torch.float64) for each in (result - param, param, result)
                ]
                self._norms.append((tensor, torch.stack(norms)))
            tensor, begin = tensor + 1, stop

    def total(self) -> Sums:
        """The sums of all threads, (tensors, 3). Waits for the device, where one worked on them."""
        total = np.zeros((len(self.ends), 3))
        for sums in self._sums.values():
            total += sums
        if self._norms:
            import torch

            values = torch.stack([norms for _, norms in self._norms]).cpu().numpy()
            np.add.at(total, [tensor for tensor, _ in self._norms], values**2)
        return total
