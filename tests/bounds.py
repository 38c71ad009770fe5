"""A kernel in Triton's interpreter may only touch elements of the tensors that it is given.

An access beyond a tensor mostly goes unnoticed, because another tensor lies there; on a GPU it may
end the process. Here the upper bits of a pointer, which no address needs, hold the number of the
tensor that it was made of, and arithmetic keeps them. So an access has to be to an element of that
very tensor, be it a slice of a larger one, whatever lies around it.

Addresses that a kernel reads from memory, such as those of `adamw_kernel`, are of no tensor.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

# Bits of an address.
_BITS = 48
_ADDRESS = np.uint64(2**_BITS - 1)
# The interpreter's accesses, and which of their arguments are the addresses and the mask.
_ACCESSES = {
    "create_masked_load": ("loads", 0, 1),
    "create_masked_store": ("stores", 0, 2),
    "create_atomic_rmw": ("changes", 1, 3),
    "create_atomic_cas": ("changes", 0, None),
}


class OutOfBoundsError(Exception):
    """A kernel touches what is no element of its tensor."""


class _Place(NamedTuple):
    """Where a tensor lies, with its number in front of both addresses."""

    tensor: Any
    first: int
    end: int
    """Past its last byte."""
    elements: Any
    """Which elements between both are its own, if not all are."""


class _Launch(NamedTuple):
    """A kernel that runs, its arguments, and the tensors among them in the order of parameters."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: list[_Place]


# The last one.
_launches: list[_Launch] = []


def watch() -> None:
    """Check all accesses from now on.

    Where a release of Triton has other private functions nothing is checked, and `test_bounds`
    fails.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if all(hasattr(builder, name) for name in _ACCESSES) and hasattr(interpreter, "_implicit_cvt"):
        interpreter.GridExecutor.__call__ = _noted(interpreter.GridExecutor.__call__)
        interpreter._implicit_cvt = _numbered(interpreter._implicit_cvt)
        for name, (*kind,) in _ACCESSES.items():
            checked = _checked(getattr(builder, name), *kind, interpreter.TensorHandle)
            setattr(builder, name, checked)


def _noted(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def run_noted(executor, *args, **kwargs):
        _launches[:] = [_Launch(executor.fn, args, kwargs, [])]
        return run(executor, *args, **kwargs)

    return run_noted


def _numbered(convert: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(convert)
    def convert_numbered(argument):
        converted = convert(argument)
        if hasattr(argument, "data_ptr"):
            places = _launches[-1].places
            # Addresses that were read from memory have 0 there.
            number = (len(places) + 1) << _BITS
            converted.handle.data = converted.handle.data | np.uint64(number)
            places.append(_place(argument, number))
        return converted

    return convert_numbered


def _place(argument: Any, number: int) -> _Place:
    tensor = getattr(argument, "base", argument)
    first = number | tensor.data_ptr()
    if tensor.numel() == 0:
        return _Place(tensor, first, first, None)
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    axes = [(size, stride) for size, stride in axes if size > 1 and stride > 0]
    span, count = 1 + sum((size - 1) * stride for size, stride in axes), 1
    for size, _ in axes:
        count *= size
    elements = None
    if count != span:
        marks = torch.zeros(span, dtype=torch.bool)
        marks.as_strided([size for size, _ in axes], [stride for _, stride in axes]).fill_(True)
        elements = marks.numpy()
    return _Place(tensor, first, first + span * tensor.element_size(), elements)


def _checked(
    access: Callable[..., Any], verb: str, pointer: int, mask: int | None, handle: Any
) -> Callable[..., Any]:
    @functools.wraps(access)
    def access_checked(builder, *args, **kwargs):
        pointers = args[pointer]
        touched = pointers.data
        valid = None if mask is None else np.asarray(args[mask].data, dtype=bool)
        if valid is not None and not valid.all():
            touched = np.broadcast_to(touched, valid.shape)[valid]
        if touched.size:
            _check(touched, pointers.dtype, verb)
        plain = handle(pointers.data & _ADDRESS, pointers.dtype)
        return access(builder, *args[:pointer], plain, *args[pointer + 1 :], **kwargs)

    return access_checked


def _check(touched: Any, dtype: Any, verb: str) -> None:
    low, high = int(touched.min()), int(touched.max())
    number = low >> _BITS
    if number != high >> _BITS:
        # Some are of another tensor.
        for one in np.unique(touched >> np.uint64(_BITS)):
            _check(touched[touched >> np.uint64(_BITS) == one], dtype, verb)
        return
    if number == 0:
        return
    place = _launches[-1].places[number - 1]
    size = max(1, dtype.scalar.element_ty.primitive_bitwidth // 8)
    inside = place.first <= low and high + size <= place.end
    if inside and place.elements is not None:
        offsets = touched.ravel() - np.uint64(place.first)
        inside = place.elements[offsets // np.uint64(size)].all()
    if not inside:
        where = (low - place.first) // size, (high - place.first) // size
        raise OutOfBoundsError(_message(number - 1, place.tensor, verb, *where))


def _message(index: int, tensor: Any, verb: str, low: int, high: int) -> str:
    function, args, kwargs, _ = _launches[-1]
    parameters = inspect.signature(function).parameters
    # Triton's options are no parameters.
    given = dict(zip(parameters, args, strict=False)) | kwargs
    names = [name for name in parameters for _ in range(_count(given.get(name)))]
    return (
        f"{function.__name__} {verb} what is no element of {names[index]}, between offsets {low} "
        f"and {high}; it is {list(tensor.shape)} with strides {list(tensor.stride())}"
    )


def _count(value: Any) -> int:
    """Pointers that an argument becomes."""
    if isinstance(value, tuple):
        return sum(map(_count, value))
    return int(hasattr(value, "data_ptr") or hasattr(getattr(value, "base", None), "data_ptr"))
