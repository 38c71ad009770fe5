"""Layer-wise distillation: every MHLA layer learns the output of the softmax layer it replaces."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mhla_gen.distillation.teacher import mhla_attentions


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each sample relative to the target's squared norm.

    Args:
        output: `[batch, …]`.
        target: Like `output`.

    Returns:
        `[batch]`, float32: 0 where equal, 1 for an output of zeros.
    """
    output, target = output.float().flatten(1), target.float().flatten(1)
    squares = target.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (output - target).square().sum(1) / squares


def relative_token_error(output: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens `[batch, seq_len, channels]` of `relative_error` of each; `[batch]`."""
    return _token_errors(output, target).mean(1)


def _token_errors(output: Tensor, target: Tensor) -> Tensor:
    each = relative_error(output.flatten(0, 1), target.flatten(0, 1))
    return each.unflatten(0, output.shape[:2])


def _of_samples(output: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """`relative_error` of text and image together."""
    return relative_error(
        *(torch.cat([x.flatten(1) for x in both], dim=1) for both in (output, target))
    )


def _of_tokens(output: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """`relative_token_error` of text and image together."""
    pairs = zip(output, target, strict=True)
    return torch.cat([_token_errors(*pair) for pair in pairs], dim=1).mean(1)


ERRORS = {"sample": _of_samples, "token": _of_tokens}


class LayerErrors:
    """Compares the MHLA layers of a student with a teacher's, on the teacher's activations.

    In training mode each MHLA layer of the student hands on what the teacher's layer makes of the
    same input, so one forward pass shows every layer the activations of the softmax model: no
    layer sees the errors of another, and gradients stay within a layer. In evaluation mode the
    student is itself.

    Args:
        student: The MHLA model; outside its attention layers it must equal the teacher.
        teacher: Its softmax twin.
        error: Name in `ERRORS`.
    """

    def __init__(self, student: Any, teacher: Any, error: str = "sample"):
        self._error = ERRORS[error]
        originals = dict(teacher.family.attentions(teacher))
        layers = mhla_attentions(student)
        self.names = tuple(layers)
        self._found: dict[str, Tensor] | None = None
        self._hooks = [
            layer.register_forward_hook(
                partial(self._compare, name, originals[name]), with_kwargs=True
            )
            for name, layer in layers.items()
        ]

    def during(self, forward: Callable[[], Any]) -> dict[str, Tensor]:
        """The error of every layer in one forward pass of the student.

        Args:
            forward: Calls the student once, in training mode.

        Returns:
            Layer name → relative squared error of each sample, `[batch]`, float32.

        Raises:
            RuntimeError: If a layer was not reached, as in evaluation mode.
        """
        self._found = {}
        try:
            forward()
            found = self._found
        finally:
            # A checkpointed block runs again in the backward pass, when nobody collects.
            self._found = None
        missing = [name for name in self.names if name not in found]
        if missing:
            raise RuntimeError(
                f"the student must run in training mode; layers not reached: {missing}"
            )
        return {name: found[name] for name in self.names}

    def remove(self) -> None:
        """Restore the student, so that it runs as usual in training mode too."""
        for hook in self._hooks:
            hook.remove()

    def _compare(
        self, name: str, original: Any, layer: Any, args: Any, kwargs: Any, output: Any
    ) -> Any:
        if not layer.training:
            return None
        with torch.no_grad():
            target = original(*args, **kwargs)
        # A layer of text and image may return both.
        error = self._error(*(x if isinstance(x, tuple) else (x,) for x in (output, target)))
        if self._found is not None:
            self._found[name] = error
        return target
