"""What a layer keeps of the sequences that it has read, for any kind of causal attention."""

from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from mhla_gen.errors import UserError


class SequenceState:
    """What states of causal attention share: their sequences are reordered, moved and saved."""

    own: ClassVar[tuple[str, ...]]
    """Names of the arguments that a state is built with, the positional one first."""
    tensors: ClassVar[tuple[str, ...]]
    """Names of its tensors, `[batch, ...]`, each None until it is needed."""
    lengths: Tensor | None

    def reorder(self, index: Tensor) -> None:
        """Replace sequence i by sequence `index[i]`: for beam search, repeats, a smaller batch.

        Raises:
            ValueError: If an entry of `index` is no sequence; the state stays as it is.
        """
        if self.lengths is None:
            return
        held = range(len(self.lengths))
        # One wait for the device; lengths are on the CPU.
        places = index.cpu()
        found: list[Any] = cast(Any, places).tolist()
        numbers = index.ndim == 1 and index.dtype in (torch.int64, torch.int32)
        if not numbers or any(i not in held for i in found):
            raise UserError(
                f"index must list sequences by their numbers, 0 to {len(held) - 1}, found {found}"
            )
        self.lengths = self.lengths[places]
        for name, tensor in self.held():
            setattr(self, name, tensor.index_select(0, index.to(tensor.device)))

    def to(self, device: torch.device | str) -> Self:
        """Move everything but `lengths` to a device; returns the state itself."""
        # Sums stay in the dtype that they were added in; a dtype is refused here.
        device = torch.device(device)
        for name, tensor in self.held():
            setattr(self, name, tensor.to(device))
        return self

    def held(self) -> list[tuple[str, Tensor]]:
        """Its tensors by name, without those that are None."""
        held = ((name, getattr(self, name)) for name in self.tensors)
        return [(name, tensor) for name, tensor in held if tensor is not None]

    def state_dict(self) -> dict[str, Any]:
        """The whole state as tensors, numbers and text, for `torch.save` and `from_state_dict`."""
        return {name: getattr(self, name) for name in (*self.own, "lengths", *self.tensors)}

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> Self:
        """Create a state from the result of `state_dict`.

        Raises:
            ValueError: If an entry is missing or unknown.
        """
        expected = {*cls.own, "lengths", *cls.tensors}
        if set(saved) != expected:
            raise UserError(
                f"a saved {cls.__name__} holds {sorted(expected)}, found {sorted(saved)}; "
                "give what state_dict returned"
            )
        first, *others = cls.own
        build: Any = cls
        state = build(saved[first], **{name: saved[name] for name in others})
        for name in ("lengths", *cls.tensors):
            setattr(state, name, saved[name])
        return state
