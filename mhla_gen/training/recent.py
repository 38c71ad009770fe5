"""Losses of the steps since the last line of the log, which checkpoints contain."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from mhla_gen.training.step import StepResult


@dataclass(frozen=True, eq=False)
class Recorded:
    """Losses and gradients of some steps, of all processes, on the CPU."""

    losses: dict[str, Tensor]
    """`loss` and others by name, each `[steps, batch]`, float32."""
    grad_norms: Tensor
    """`[steps]`, float32."""
    timesteps: Tensor
    """`[steps, batch]`."""


class RecentSteps:
    """The steps since the last line of the log.

    Losses stay on their device until they are asked for: reading one waits for the device. In a
    checkpoint they let the next line of a resumed run be that of an uninterrupted one.

    Args:
        accelerator: Of the run.
        num_parts: Micro-batches of a step.
    """

    def __init__(self, accelerator: Accelerator, num_parts: int):
        self.accelerator, self.num_parts = accelerator, num_parts
        self._recorded: Recorded | None = None
        self._results: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        """Add the results of a step."""
        self._results.append(result)

    def clear(self) -> None:
        """Forget all steps after their line is written."""
        self._recorded, self._results = None, []

    def recorded(self) -> Recorded | None:
        """All of them, None if there are none; every process must call this."""
        if self._results:
            new = self._gathered()
            self._recorded = _joined(self._recorded, new) if self._recorded else new
            self._results = []
        return self._recorded

    def state(self) -> dict[str, Tensor]:
        """The state for a checkpoint; every process must call this."""
        recorded = self.recorded()
        if recorded is None:
            return {}
        losses = {f"losses.{name}": values for name, values in recorded.losses.items()}
        others = {"grad_norms": recorded.grad_norms, "timesteps": recorded.timesteps}
        return {name: tensor.contiguous() for name, tensor in (losses | others).items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.clear()
        if state:
            prefix = "losses."
            losses = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            self._recorded = Recorded(losses, state["grad_norms"], state["timesteps"])

    def state_dict(self) -> dict[str, Any]:
        """As accelerate asks for it."""
        return dict(self.state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint of an earlier version."""
        self.clear()
        if state_dict:
            self._recorded = Recorded(**state_dict)

    def _gathered(self) -> Recorded:
        results = self._results
        names = list(results[0].losses)
        own = torch.stack([torch.stack([r.losses[name] for r in results]) for name in names])
        losses = gathered_parts(self.accelerator, own, self.num_parts).float().cpu()
        return Recorded(
            dict(zip(names, losses, strict=True)),
            torch.stack([result.grad_norm for result in results]).float().cpu(),
            torch.stack([result.timesteps for result in results]),
        )


def _joined(earlier: Recorded, later: Recorded) -> Recorded:
    return Recorded(
        {name: torch.cat([earlier.losses[name], later.losses[name]]) for name in later.losses},
        torch.cat([earlier.grad_norms, later.grad_norms]),
        torch.cat([earlier.timesteps, later.timesteps]),
    )


def gathered_parts(accelerator: Accelerator, own: Tensor, num_parts: int) -> Tensor:
    """The parts of all processes, in the order of the batch.

    Args:
        accelerator: Of the run.
        own: `[…, samples]` of this process, part after part.
        num_parts: Micro-batches; every process has as many samples of each.

    Returns:
        `[…, batch]`.
    """
    every = cast(Tensor, accelerator.gather(own[None]))
    # [processes, …, parts, rows]: in the batch the processes' rows lie beside each other.
    every = every.unflatten(-1, (num_parts, -1)).movedim(0, -2)
    return every.flatten(-3)
