"""Launches of kernels that Triton has compiled before, without inspecting every argument.

That inspection takes longer than a small kernel runs, and training would repeat it for every layer
and step. Its result depends only on the key below.

The result of a launch, and how to launch it again, are not part of Triton's public interface. If a
release changes them, every launch takes the normal path.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# Triton specializes on pointers only by whether they are aligned to 16 bytes.
_ALIGNED = 16
_COMPILED: dict[tuple, tuple[Any, tuple] | None] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Any],
    scalars: tuple,
    constants: dict[str, Any],
) -> None:
    """`kernel[grid](*tensors, *scalars, **constants)`.

    Args:
        kernel: A function of `triton.jit`; its parameters come in this order.
        grid: Programs along up to three axes.
        tensors: Tensors on one device, or descriptors of them; None where the kernel has nothing
            to read.
        scalars: Numbers of the call, or tuples of numbers.
        constants: Compile-time parameters and Triton's options, hashable.
    """
    pointers, dtypes, device = 0, [], -1
    for tensor in tensors:
        if tensor is None:
            dtypes.append(None)
        elif isinstance(tensor, Tensor):
            pointers |= tensor.data_ptr()
            dtypes.append(tensor.dtype)
            device = tensor.get_device()
        else:
            dtypes.append((tensor.base.dtype, *tensor.block_shape))
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
