"""How loops are compiled, and how to read the functions whose instructions are written out.

``compiled()`` is numba's ``njit``. Some functions of digest.py and fused.py are not compiled from Python but emit their
instructions themselves, through numba's ``@intrinsic``. numba compiles by way of LLVM, whose language is a typed
assembly with as many registers as one likes. To read such a function:

- The function runs while numba compiles a caller, once for each combination of argument types. Called with the types,
  it returns a signature and a function ``code(context, builder, signature, arguments)``; ``code`` then appends
  instructions at the place of the call. ``arguments`` are the registers that will hold the values.
- ``builder.load``, ``fsub``, ``xor`` and so on append one instruction and return the register of its result. A Python
  ``for`` around them runs at compile time: the instructions of its body are appended once a turn, as an unrolled loop.
  A Python ``if`` decides whether instructions are appended at all.
- ``ir.VectorType(ir.FloatType(), 16)`` is one value of 16 float32, and one instruction computes all 16. LLVM splits
  such an instruction into what the processor has: one with AVX-512, two with AVX2, four with SSE or NEON.
- ``bitcast`` reads the same bits as another type, at no cost. ``gep`` (get element pointer) adds an index to an
  address. ``shuffle_vector`` picks elements of a vector by constant indices. ``zext`` widens an integer with zeros.
- ``align`` promises what the address of a load or a store is a multiple of. A broken promise crashes the process.

Beside each such function stands the same in numpy (``..._numpy``): slower, readable, and what the tests compare with.

Knows numba. Does not know the loops.
"""

from __future__ import annotations

import contextlib
from typing import Any

from numba import njit

from ema_service.averaging.compiling_cache import CheckedCache

__all__ = ["compiled"]


def compiled(function: Any) -> Any:
    """The function compiled for the types of its arguments on its first call; it runs without the interpreter lock.

    function: of numbers and numpy arrays. numba caches the machine code beside the function's file, or in the user's
    cache folder. Where neither can be written to, or the files are damaged, the process compiles anew, which takes
    seconds.
    """
    dispatcher: Any = njit(nogil=True, error_model="numpy")(function)
    with contextlib.suppress(RuntimeError):  # no place for files
        dispatcher._cache = CheckedCache(function)
    return dispatcher
