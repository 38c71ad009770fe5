"""Triton's interpreter without what it does again and again, which is half of its time.

It changes `triton.language` when a kernel is launched, and would do so anew, with all of its
hundreds of names, whenever a kernel calls a function of its own or of Triton. Once a launch is
enough: where a name is changed, all are.
"""

import functools
from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter

_NOTHING = SimpleNamespace(restore=lambda: None)
_change = interpreter._patch_lang


@functools.cache
def _languages(function):
    """The modules that `_patch_lang` changes for a function."""
    read = function.__globals__.values()
    return [module for module in (tl, tl.core) if any(module is each for each in read)]


def _change_once(function):
    languages = _languages(function)
    changed = languages and not any(tl.core.is_builtin(module.load) for module in languages)
    return _NOTHING if changed else _change(function)


interpreter._patch_lang = _change_once
