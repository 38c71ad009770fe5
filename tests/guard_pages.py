"""A pytest plugin: guard pages around every tensor that an interpreted kernel gets.

An access beyond a tensor mostly goes unnoticed, because another one lies there. With the plugin,
kernels work on copies right behind which no memory is mapped (or before which, with GUARD=start),
so that such an access ends the process, and faulthandler names the kernel's line.
"""

import ctypes
import faulthandler
import mmap
import os

import torch
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor
from triton.tools.tensor_descriptor import TensorDescriptor

AT_START = os.environ.get("GUARD") == "start"
_PROTECT = ctypes.CDLL(None, use_errno=True).mprotect
_NO_ACCESS = 0
_run = GridExecutor.__call__


class GuardedCopy:
    """A copy of the bytes [first, last)."""

    def __init__(self, first, last):
        self.first, self.last = first, last
        size, page = last - first, mmap.PAGESIZE
        inside = -(-size // page) * page
        self.memory = mmap.mmap(-1, inside + 2 * page)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for guard in (begin, begin + page + inside):
            if _PROTECT(ctypes.c_void_p(guard), page, _NO_ACCESS) != 0:
                raise OSError(ctypes.get_errno(), "cannot protect a page")
        self.place = begin + page + (0 if AT_START else inside - size)
        ctypes.memmove(self.place, first, size)

    def view(self, x):
        """A tensor of the original bytes, in the copy."""
        first, last = span(x)
        memory = (ctypes.c_char * (last - first)).from_address(self.place + first - self.first)
        return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, x.stride())

    def give_back(self):
        """Write the bytes to where they came from."""
        ctypes.memmove(self.first, self.place, self.last - self.first)


def span(x):
    """Addresses of a tensor's first byte and of that past the last one."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def tensors_of(arguments):
    """All that are not empty."""
    leaves = (x.base if isinstance(x, TensorDescriptor) else x for x in tree_leaves(arguments))
    return [x for x in leaves if torch.is_tensor(x) and x.numel()]


def run_guarded(executor, *args, **kwargs):
    """Run a kernel on copies; tensors whose bytes interleave are in one."""
    spans = []
    for first, last in sorted(map(span, tensors_of((args, kwargs)))):
        if spans and first < spans[-1][1]:
            spans[-1][1] = max(last, spans[-1][1])
        else:
            spans.append([first, last])
    copies = [GuardedCopy(*each) for each in spans]

    def moved(x):
        if isinstance(x, TensorDescriptor):
            return TensorDescriptor(moved(x.base), x.shape, x.strides, x.block_shape, x.padding)
        if torch.is_tensor(x) and x.numel():
            return next(c for c in copies if c.first <= x.data_ptr() < c.last).view(x)
        return x

    args, kwargs = tree_map(moved, (args, kwargs))
    _run(executor, *args, **kwargs)
    for copy in copies:
        copy.give_back()


GridExecutor.__call__ = run_guarded
faulthandler.enable()
