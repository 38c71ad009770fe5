"""Triton's interpreter without what it does again and again, which is more than half of its time.

It changes `triton.language` when a kernel is launched, and would do so anew, with all of its
hundreds of names, whenever a kernel calls a function of its own or of Triton. Once a launch is
enough: where a name is changed, all are. Nor does it make a table of all dtypes to look up one.
"""

import functools
from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter

_NOTHING = SimpleNamespace(restore=lambda: None)
_change = interpreter._patch_lang
_find_dtype = functools.cache(interpreter._get_np_dtype)
_ADDRESS = interpreter._get_np_dtype(tl.pointer_type(tl.int8))


@functools.cache
def _languages(function):
    """The modules that `_patch_lang` changes for a function."""
    read = function.__globals__.values()
    return [module for module in (tl, tl.core) if any(module is each for each in read)]


def _change_once(function):
    languages = _languages(function)
    changed = languages and not any(tl.core.is_builtin(module.load) for module in languages)
    return _NOTHING if changed else _change(function)


def _dtype(kind):
    """What numpy has for a dtype of Triton, for a tensor of it, or for addresses."""
    scalar = kind.scalar
    return _ADDRESS if isinstance(scalar, tl.pointer_type) else _find_dtype(scalar)


interpreter._patch_lang = _change_once
interpreter._get_np_dtype = _dtype
