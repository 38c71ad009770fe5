"""Launches of kernels that Triton has compiled before, without its look at every argument.

That look takes longer than a small kernel runs, and in training it is taken for every layer and
step. What it finds depends on no more than the key below.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# A 16-byte boundary is all that Triton asks of a pointer.
_ALIGNED = 16
_COMPILED: dict[tuple, tuple[Any, tuple]] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    scalars: tuple,
    constants: dict[str, Any],
) -> None:
    """`kernel[grid](*tensors, *scalars, **constants)`.

    Args:
        kernel: A function of `triton.jit`; its parameters come in this order.
        grid: Programs along up to three axes.
        tensors: On one device; None where the kernel has nothing to read.
        scalars: Numbers of the call, or tuples of them.
        constants: Compile-time parameters and Triton's options, hashable.
    """
    pointers, dtypes, device = 0, [], -1
    for tensor in tensors:
        if tensor is None:
            dtypes.append(None)
        else:
            pointers |= tensor.data_ptr()
            dtypes.append(tensor.dtype)
            device = tensor.get_device()
    key = (id(kernel), device, *dtypes, scalars, *constants.values())
    found = _COMPILED.get(key)
    if found is not None and pointers % _ALIGNED == 0:
        compiled, tail = found
        compiled[(*grid, 1, 1)[:3]](*tensors, *scalars, *tail)
        return
    compiled = kernel[grid](*tensors, *scalars, **constants)
    # The interpreter compiles nothing.
    if compiled is not None and pointers % _ALIGNED == 0:
        tail = kernel.arg_names[len(tensors) + len(scalars) :]
        _COMPILED[key] = compiled, tuple(constants[name] for name in tail)
