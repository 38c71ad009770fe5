"""Triton's interpreter without what it does again and again, which is more than half of its time.

It changes `triton.language` when a kernel is launched, and would do so anew, with all of its
hundreds of names, whenever a kernel calls a function of its own or of Triton. Once a launch is
enough: where a name is changed, all are. Nor does it make a table of all dtypes to look up one.
"""

import functools
from types import SimpleNamespace

import triton
import triton.language as tl

# The release whose private functions are replaced; with others, tests take longer.
KNOWN = "3.8."
_NOTHING = SimpleNamespace(restore=lambda: None)


def hasten():
    """Replace private functions of the interpreter, if they are known."""
    if triton.__version__.startswith(KNOWN):
        from triton.runtime import interpreter

        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
        interpreter._get_np_dtype = _looked_up_once(interpreter._get_np_dtype)


def _once_a_launch(change):
    @functools.cache
    def languages(function):
        """The modules that `change` changes for a function."""
        read = function.__globals__.values()
        return [module for module in (tl, tl.core) if any(module is each for each in read)]

    @functools.wraps(change)
    def change_once(function):
        found = languages(function)
        names = tl.tensor.__add__, *(module.load for module in found)
        changed = found and not any(map(tl.core.is_builtin, names))
        return _NOTHING if changed else change(function)

    return change_once


def _looked_up_once(find):
    address, find_once = find(tl.pointer_type(tl.int8)), functools.cache(find)

    @functools.wraps(find)
    def dtype_of(kind):
        """What numpy has for a dtype of Triton, for a tensor of it, or for addresses."""
        scalar = kind.scalar
        return address if isinstance(scalar, tl.pointer_type) else find_once(scalar)

    return dtype_of
