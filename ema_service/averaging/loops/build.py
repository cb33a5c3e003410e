"""The compiled loops as object code: numba makes them of their source, for this machine's processor.

Knows numba, the loops' source and the names by which they are called. Does not know where object code is kept.
"""

from __future__ import annotations

import sys
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba import types
from numba.core.cgutils import unpack_tuple
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from numba.np.numpy_support import from_dtype

from ema_service.averaging.loops.average import average, average_measured
from ema_service.averaging.loops.compiled import compiled
from ema_service.averaging.loops.xxh3 import take_last as _take_last
from ema_service.averaging.signatures import MEASURING_BYTES, SIGNATURES
from ema_service.averaging.xxh3 import GULP_BYTES, LANES

__all__ = ["build", "main"]

_MEMORY = MEASURING_BYTES // 8
#: numba's ``intrinsic``, untyped, as in average.py.
_instructions: Any = intrinsic


# --- what is called: addresses, of which arrays are made -------------------------------------------------------------


@_instructions
def _array(_typing, pointer, shape):  # type: ignore[no-untyped-def]
    """_array(pointer, shape): the array of this shape at an address, as numba's carray(), which wants to count
    references. Emits the array's fields."""
    kind = types.Array(pointer.dtype, len(shape), "C")

    def code(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        array = context.make_array(kind)(context, builder)
        size = context.get_constant(types.intp, pointer.dtype.bitwidth // 8)
        counts = unpack_tuple(builder, arguments[1])  # type: ignore[no-untyped-call]
        strides = [size]
        for count in reversed(counts[1:]):
            strides.insert(0, builder.mul(strides[0], count))
        populate_array(array, data=arguments[0], shape=counts, strides=strides, itemsize=size, meminfo=None)  # type: ignore[no-untyped-call]
        return array._getvalue()

    return kind(pointer, shape), code


@compiled
def _averaging(  # type: ignore[no-untyped-def]  # numba infers the types
    out, shadow, param, count, weight, params, n_params, results, n_results, past_cache
):
    new, old, fresh = _array(out, (count,)), _array(shadow, (count,)), _array(param, (count,))
    taken, made = _array(params, (n_params,)), _array(results, (n_results,))
    return np.int64(average(new, old, fresh, weight, taken, made, past_cache != 0))


@compiled
def _measuring(  # type: ignore[no-untyped-def]
    out, shadow, param, count, weight, params, n_params, results, n_results, past_cache, first, ends, n_ends, sums, own
):
    new, old, fresh = _array(out, (count,)), _array(shadow, (count,)), _array(param, (count,))
    taken, made = _array(params, (n_params,)), _array(results, (n_results,))
    by_tensor, tensors = _array(sums, (n_ends, 3)), _array(ends, (n_ends,))
    memory = _array(own, (_MEMORY,))
    given = past_cache != 0
    return np.int64(average_measured(new, old, fresh, weight, taken, made, given, first, tensors, by_tensor, memory))


@compiled
def _last(accumulators, data):  # type: ignore[no-untyped-def]
    _take_last(_array(accumulators, (LANES,)), _array(data, (GULP_BYTES,)), 0)
    return np.int64(0)


@compiled
def _add(total, values, count, weight):  # type: ignore[no-untyped-def]
    sums, added = _array(total, (count,)), _array(values, (count,))
    for i in range(count):
        sums[i] += weight * added[i]
    return np.int64(0)


_SOURCES = {"average": _averaging, "measure": _measuring, "take": _last, "add": _add}

# --- compiling -------------------------------------------------------------------------------------------------------


def build(group: str) -> bytes:
    """The object code of a group of loops (machine_code.SIGNATURES), each under its name."""
    modules = [_module(name, kinds) for name, kinds in SIGNATURES[group].items()]
    for other in modules[1:]:
        modules[0].link_in(other)
    return bytes(_machine().emit_object(modules[0]))


def main(group: str) -> None:
    """Write the object code of a group to standard output."""
    sys.stdout.buffer.write(build(group))


def _module(name: str, kinds: str) -> Any:
    """One loop, optimised, in LLVM's language. Raises RuntimeError where the loop needs anything else."""
    source: Any = _SOURCES[name.partition("_")[0]]
    arguments = tuple(_type_of(kind) for kind in kinds.split())
    source.compile(arguments)
    made = source.overloads[arguments]
    module = llvm.parse_assembly(made.library.get_llvm_str())
    module.get_function(made.fndesc.llvm_func_name).name = name
    _keep(module, name)
    needed = [f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if needed:
        raise RuntimeError(f"the loop {name} needs {', '.join(needed)}")
    return module


def _keep(module: Any, name: str) -> None:
    """Leave out of a module what the function of this name does not need."""
    for each in (*module.functions, *module.global_variables):
        if each.name != name and not each.is_declaration:
            each.linkage = "internal"
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(_machine(), llvm.create_pipeline_tuning_options()))


def _type_of(kind: str) -> Any:
    """numba's type of an argument."""
    plain = from_dtype(np.dtype(kind.removesuffix("*")))
    return types.CPointer(plain) if kind.endswith("*") else plain  # type: ignore[no-untyped-call]


def _machine() -> Any:
    """This machine's processor, with the options that numba compiles for it with."""
    target = llvm.Target.from_default_triple()
    reloc = "static" if target.name.startswith("x86") else "default"
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(
        cpu=cpu, features=features, opt=3, reloc=reloc, codemodel="jitdefault", jit=True
    )
