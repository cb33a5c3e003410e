"""The source of the compiled loops: imported only where they are compiled, for numba takes 0.25 s and 75 MiB.

A server loads the machine code that was made of these modules (machine_code.py).

Some functions are not compiled from Python but emit their instructions themselves, through numba's ``@intrinsic``.
numba compiles by way of LLVM, whose language is a typed assembly with as many registers as one likes. To read such a
function:

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

Knows numba and LLVM. Does not know who calls the loops, or where machine code is kept.
"""
