"""Modules that are called with a fixed number of rows, whatever the batch.

Matrix products and convolutions choose their algorithm by the number of rows, and with it the order
in which they add. So a sample's last bits would depend on its batch. Called in parts of one fixed
size, each sample in the same place of its part, they do not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mhla_gen.runtime.devices import without_onednn


class InParts:
    """A function of batches, called with `rows` rows at a time.

    The first tensor says how many rows a batch has; all tensors with as many are cut, other
    arguments are handed on. The last part is filled up with its last row.
    """

    def __init__(self, function: Callable[..., Any], rows: int):
        self.function, self.rows = function, rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's results of all parts, joined."""
        tensors = [x for x in (*args, *kwargs.values()) if _has_rows(x)]
        total = len(tensors[0])
        results = []
        for start in range(0, total, self.rows):
            part = slice(start, start + self.rows)

            def cut(x: Any, part: slice = part) -> Any:
                return _filled(x[part], self.rows) if _has_rows(x) and len(x) == total else x

            results.append(self.function(*map(cut, args), **{k: cut(v) for k, v in kwargs.items()}))
        return _joined(results, total)


@contextmanager
def in_parts(module: Any, method: str, rows: int) -> Iterator[InParts]:
    """Let a method of a module be called in parts inside.

    Args:
        module: A model.
        method: Name of its method.
        rows: Rows of a part.

    Yields:
        The replacement; its `rows` may be changed.
    """
    original = getattr(module, method)
    # A method stands in the class; a hook of accelerate has put its own into the module.
    hooked = method in vars(module)
    parts = InParts(without_onednn()(original) if method == "decode" else original, rows)
    setattr(module, method, parts)
    try:
        yield parts
    finally:
        if hooked:
            setattr(module, method, original)
        else:
            delattr(module, method)


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0


def _filled(x: Tensor, rows: int) -> Tensor:
    missing = rows - len(x)
    return x if not missing else torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])


def _joined(results: list[Any], total: int) -> Any:
    """Tensors, tuples of tensors, or an output class of diffusers, one after the other."""
    first = results[0]
    if isinstance(first, Tensor):
        # Copied even if it is alone: a CUDA graph writes its next result to the same place.
        return torch.cat(results)[:total]
    if isinstance(first, tuple):
        return tuple(_joined(list(column), total) for column in zip(*results, strict=True))
    return replace(first, sample=_joined([result.sample for result in results], total))
