"""Launches of kernels that Triton has compiled before, without its look at every argument.

That look takes longer than a small kernel runs, and in training it is taken for every layer and
step. What it finds depends on no more than the key below.

What a launch returns and how it is launched again is not part of Triton's public interface. Where a
release has it otherwise, every launch goes the ordinary way.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# A 16-byte boundary is all that Triton asks of a pointer.
_ALIGNED = 16
_COMPILED: dict[tuple, tuple[Any, tuple] | None] = {}


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
        try:
            compiled[(*grid, 1, 1)[:3]](*tensors, *scalars, *tail)
            return
        except (AttributeError, TypeError):
            # Nothing was launched; an error of the caller's comes again below.
            _COMPILED[key] = None
    compiled = kernel[grid](*tensors, *scalars, **constants)
    # The interpreter compiles nothing.
    if compiled is not None and pointers % _ALIGNED == 0 and key not in _COMPILED:
        _COMPILED[key] = _again(kernel, compiled, len(tensors) + len(scalars), constants)


def _again(kernel: Any, compiled: Any, given: int, constants: dict[str, Any]) -> Any:
    """A compiled kernel and what its call ends with; None where a kernel does not tell."""
    try:
        return compiled, tuple(constants[name] for name in kernel.arg_names[given:])
    except (AttributeError, KeyError):
        return None
