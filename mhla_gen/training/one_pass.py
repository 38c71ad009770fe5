"""Clipping, AdamW and the average of the weights in one pass over the memory.

One after the other, they move 48 bytes a weight; together, 36. Both ways compute the same, but for
the rounding of single operations.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhla_gen.errors import UserError
from mhla_gen.ops.fused_limits import HAS_TRITON, INTERPRETED
from mhla_gen.training.ema import WeightAverage


class _Tensors(NamedTuple):
    """What belongs to one parameter, all of one shape."""

    weight: Tensor
    gradient: Tensor
    mean: Tensor
    """AdamW's average of gradients."""
    square: Tensor
    """AdamW's average of squared gradients."""
    average: Tensor
    """Of the weights."""


class OnePass:
    """Updates weights and their averages as clipping, `AdamW.step` and `WeightAverage.step` do.

    The first step is left to them, since it creates AdamW's state.

    Args:
        optimizer: One for which `build_one_pass` makes this.
        average: Of all parameters.
        others: Parameters that are changed after a step, before they are averaged; they are left
            to the optimizer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage,
        others: Collection[nn.Parameter],
    ):
        self._optimizer, self._average = optimizer, average
        self._others = {id(parameter) for parameter in others}
        # Of each group: what it was made for, and the tables of the kernel.
        self._tables: dict[int, tuple[Any, Any]] = {}
        # The parameters of each group that were updated last, and in which step.
        self._steps: dict[int, tuple[tuple[int, ...], int | None]] = {}
        self._state: Any = None

    @torch.no_grad()
    def __call__(self, parameters: Sequence[nn.Parameter], factor: Tensor) -> set[int]:
        """Update what can be updated, and set its gradients to None.

        Args:
            parameters: All that are averaged, in that order.
            factor: What gradients are multiplied by first, a scalar.

        Returns:
            The `id` of each updated parameter.
        """
        done: set[int] = set()
        if self._optimizer.state is not self._state:
            # At first, and when a checkpoint has been read.
            self._state = self._optimizer.state
            self._steps.clear()
        averages = dict(zip(map(id, parameters), self._average.shadow_params, strict=True))
        device = factor.device
        for number, group in enumerate(self._optimizer.param_groups):
            chosen = [p for p in group["params"] if self._fits(p, averages.get(id(p)), device)]
            if not chosen:
                # The optimizer may count steps that are not seen here.
                self._steps.pop(number, None)
                continue
            steps = [self._state[p]["step"] for p in chosen]
            count = self._count(number, chosen, steps)
            if count is None:
                continue
            torch._foreach_add_(steps, 1)
            tensors = [self._tensors(p, averages[id(p)]) for p in chosen]
            self._update(number, group, count, tensors, factor)
            for parameter in chosen:
                parameter.grad = None
            done.update(map(id, chosen))
        return done

    def _count(
        self, number: int, chosen: Sequence[nn.Parameter], steps: Sequence[Tensor]
    ) -> int | None:
        """The number of this step, for parameters of a group; None where it differs."""
        before, count = self._steps.get(number, ((), None))
        named = tuple(map(id, chosen))
        if named == before:
            count = None if count is None else count + 1
        else:
            # Waits for the GPU, so only if others than in the last step are updated.
            found = {int(step) for step in torch.stack(list(steps)).tolist()}
            count = found.pop() + 1 if len(found) == 1 else None
        self._steps[number] = named, count
        return count

    def _fits(self, parameter: nn.Parameter, average: Tensor | None, device: torch.device) -> bool:
        """Whether a parameter's numbers lie as the kernel reads them."""
        state = self._state.get(parameter)
        if average is None or parameter.grad is None or not state:
            return False
        if id(parameter) in self._others:
            return False
        return all(
            x.dtype == torch.float32 and x.device == device and x.is_contiguous()
            for x in self._tensors(parameter, average)
        )

    def _tensors(self, parameter: nn.Parameter, average: Tensor) -> _Tensors:
        state = self._state[parameter]
        assert parameter.grad is not None
        return _Tensors(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], average)

    def _update(
        self,
        number: int,
        group: dict[str, Any],
        count: int,
        tensors: Sequence[_Tensors],
        factor: Tensor,
    ) -> None:
        from mhla_gen.ops.kernels.adamw import make_tables, update

        addresses = [x.data_ptr() for each in tensors for x in each]
        before, tables = self._tables.get(number, (None, None))
        if addresses != before:
            tables = make_tables(
                addresses, [each.weight.numel() for each in tensors], factor.device
            )
            self._tables[number] = addresses, tables
        beta1, beta2 = group["betas"]
        decay = self._average.get_decay(self._average.optimization_step + 1)
        try:
            update(
                tables,
                factor,
                rate=group["lr"] / (1 - beta1**count),
                shrink=1 - group["lr"] * group["weight_decay"],
                rest1=1 - beta1,
                beta2=beta2,
                rest2=1 - beta2,
                root=(1 - beta2**count) ** -0.5,
                eps=group["eps"],
                share=1 - decay,
            )
        except Exception as error:
            # Such as no C compiler, which Triton needs, and softmax in PyTorch does not.
            error.add_note("one_pass=false trains without this kernel")
            raise


def build_one_pass(
    wanted: bool | None,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage,
    others: Collection[nn.Parameter],
    device: torch.device,
    *,
    shared: bool,
) -> OnePass | None:
    """The one pass of a run, or None if its three passes follow each other.

    Args:
        wanted: None for one pass wherever it is possible, but not in Triton's interpreter.
        optimizer: Of the run.
        average: As of `OnePass`.
        others: As of `OnePass`.
        device: Of the parameters.
        shared: Whether each process holds parts of the parameters.

    Raises:
        UserError: If it is wanted but not possible.
    """
    reason = _obstacle(optimizer, device, shared)
    if wanted and reason is not None:
        raise UserError(f"one_pass=true {reason}; leave one_pass out")
    if wanted is False or reason is not None or (wanted is None and device.type != "cuda"):
        return None
    return OnePass(optimizer, average, others)


def _obstacle(optimizer: torch.optim.Optimizer, device: torch.device, shared: bool) -> str | None:
    """Why the kernel cannot update parameters, or None if it can."""
    kind = type(optimizer)
    if kind is not torch.optim.AdamW:
        return f"needs optimizer=AdamW, found {kind.__name__}"
    for name in ("amsgrad", "maximize"):
        if any(group[name] for group in optimizer.param_groups):
            return f"needs AdamW without {name}"
    if shared:
        return "needs whole weights, which parallelism=fsdp does not have"
    if not HAS_TRITON:
        return "needs the package triton"
    if device.type != "cuda" and not INTERPRETED:
        return f"needs a GPU, found {device}"
    return None
