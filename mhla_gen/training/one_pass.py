"""Clipping, AdamW and the average of the weights in one pass over the memory.

One after the other, they move 48 bytes a weight; together, 36. Both ways compute the same, but for
the rounding of single operations.
"""

from collections.abc import Collection, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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
        optimizer: Any; only an `AdamW` without variants has its parameters updated here.
        average: Of all parameters.
        others: Parameters that are changed after a step, before they are averaged; they are left
            to the optimizer.
        device_type: Parameters on other devices are left to the optimizer, too; None leaves all.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage,
        others: Collection[nn.Parameter],
        device_type: str | None = "cuda",
    ):
        self._optimizer, self._average = optimizer, average
        self._others = {id(parameter) for parameter in others}
        self._device_type = device_type
        self._usable = (
            device_type is not None
            and type(optimizer) is torch.optim.AdamW
            and find_spec("triton") is not None
        )
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
        if not self._usable:
            return done
        if self._optimizer.state is not self._state:
            # At first, and when a checkpoint has been read.
            self._state = self._optimizer.state
            self._steps.clear()
        averages = dict(zip(map(id, parameters), self._average.shadow_params, strict=True))
        for number, group in enumerate(self._optimizer.param_groups):
            chosen = [p for p in group["params"] if self._fits(p, averages.get(id(p)))]
            if not chosen or not _plain(group):
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

    def _fits(self, parameter: nn.Parameter, average: Tensor | None) -> bool:
        """Whether a parameter's numbers lie as the kernel reads them."""
        state = self._state.get(parameter)
        if average is None or parameter.grad is None or not state:
            return False
        if id(parameter) in self._others or isinstance(parameter, DTensor):
            return False
        return all(
            x.dtype == torch.float32 and x.device.type == self._device_type and x.is_contiguous()
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


def _plain(group: dict[str, Any]) -> bool:
    """Whether a group of AdamW's parameters is updated by the equations of the kernel."""
    variants = (group["amsgrad"], group["maximize"], isinstance(group["lr"], Tensor))
    return not any(variants) and group.get("decoupled_weight_decay", True)
