"""State of a frame-causal model: its memory of a clip's finished chunks."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from mhla_gen.errors import UserError
from mhla_gen.models.frame_causal import ClipLayerState, FrameCausalMHLA

# Settings that change nothing about what a model computes once it is trained.
_ASIDE = ("implementation", "mixing_init", "mixing_learnable", "exact_start")


class ClipState:
    """A frame-causal transformer's memory of the finished chunks of a clip.

    Calling the state runs the model on the clip's next chunk, which attends to the finished chunks
    before it. Outputs and gradients are those of the whole clip in one call. Time and memory of a
    call are the same for every chunk, except in softmax layers (`exact=1`), which keep keys and
    values. A `copy.deepcopy` continues the clip on its own, with the same model; torch refuses it
    where gradients are recorded.

    Args:
        model: A transformer converted with `MHLAConfig(causal_frames=…)`.

    Attributes:
        frames: Number of latent frames in finished chunks.

    Raises:
        ValueError: If the model is not frame-causal.
    """

    def __init__(self, model: Any):
        self.model = model
        self.frames = 0
        self._torn = False
        self._chunks: tuple[int | str, ...] | None = None
        self.layers = {
            layer: ClipLayerState(layer.chunk_frames)
            for layer in model.modules()
            if isinstance(layer, FrameCausalMHLA)
        }
        if not self.layers:
            raise UserError(
                f"this {type(model).__name__} is not causal over frames; convert a model with "
                "MHLAConfig(causal_frames=…)"
            )

    def __call__(
        self, latents: Tensor, timestep: Tensor, *, append: bool = False, **conditions: Any
    ) -> Tensor:
        """The model's prediction for the next chunk.

        Args:
            latents: `[batch, channels, frames, height, width]`, of `causal_frames` frames, or fewer
                in the clip's last chunk.
            timestep: `[batch]`, or `[batch, tokens]`.
            append: Add this chunk, with these latents, to the finished ones that later chunks read.
            conditions: Further arguments of the model, such as `encoder_hidden_states`.

        Returns:
            Like `latents`.

        Raises:
            ValueError: If the latents cannot be the clip's next chunk, or an earlier one was added
                in part, because its call failed.
        """
        model = self.model
        if self._torn:
            raise UserError(
                "an earlier chunk was added in part, as its call failed: read the clip's finished "
                "chunks again with a new ClipState"
            )
        chunks = (*latents.shape[:2], *latents.shape[3:], self._dtype(latents.device.type))
        if self._chunks not in (None, chunks):
            raise UserError(
                "the clip's chunks are (batch, channels, height, width, dtype) "
                f"{self._chunks}, found {chunks}"
            )
        if getattr(model, "is_gradient_checkpointing", False) and torch.is_grad_enabled():
            raise UserError(
                "a clip's state changes while chunks are read, so they cannot be read again; call "
                "model.disable_gradient_checkpointing() first, or give the whole clip at once"
            )
        try:
            with self._remembered(append):
                out = model(latents, timestep=timestep, **conditions, return_dict=False)[0]
        except ValueError:
            # What is wrong with a chunk is found before the first layer adds it.
            self._torn = any(state.added for state in self.layers.values())
            raise
        except BaseException:
            self._torn = append
            raise
        if append:
            self.frames += latents.shape[2]
            self._chunks = chunks
        return out

    def to(self, device: torch.device | str) -> Self:
        """Move the memory to a device, but not the model; returns the state itself."""
        for state in self.layers.values():
            state.to(torch.device(device))
        return self

    def state_dict(self) -> dict[str, Any]:
        """The memory as tensors and numbers, for `torch.save` and `from_state_dict`."""
        layers = [state.state_dict() for state in self.layers.values()]
        return {
            "model": self._model(),
            "frames": self.frames,
            "chunks": self._chunks,
            "torn": self._torn,
            "layers": layers,
        }

    @classmethod
    def from_state_dict(cls, model: Any, saved: dict[str, Any]) -> Self:
        """Create the state of a model from the result of `state_dict`.

        Raises:
            ValueError: If it is something else, or of a model with other settings or sizes.
        """
        state = cls(model)
        expected = set(state.state_dict())
        if set(saved) != expected:
            raise UserError(
                f"a saved ClipState holds {sorted(expected)}, found {sorted(saved)}; give what "
                "state_dict returned"
            )
        for name, value in state._model().items():
            if (found := saved["model"].get(name)) != value:
                raise UserError(
                    f"the saved state is of a model with {name}={found}, found one with {value}"
                )
        state.frames, state._chunks, state._torn = saved["frames"], saved["chunks"], saved["torn"]
        for layer, held in zip(state.layers, saved["layers"], strict=True):
            state.layers[layer] = ClipLayerState.from_state_dict(layer.chunk_frames, held)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of all but the model."""
        memo |= {id(part): part for part in (*self.model.modules(), *self.model.parameters())}
        twin = copy.copy(self)
        twin.layers = copy.deepcopy(self.layers, memo)
        return twin

    @property
    def bytes(self) -> int:
        """Size of the state in bytes."""
        kept = (tensor for layer in self.layers.values() for tensor in layer.tensors)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def _model(self) -> dict[str, Any]:
        """What the model must have in common with one that reads this memory."""
        settings, layer = self.model.mhla_config.to_dict(), next(iter(self.layers))
        return {
            "num_layers": len(self.layers),
            "num_heads": layer.num_heads,
            "head_dim": layer.head_dim,
            **{name: value for name, value in settings.items() if name not in _ASIDE},
        }

    def _dtype(self, device: str) -> str:
        """The dtype in which layers compute on this kind of device."""
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.model.dtype
        return str(dtype).removeprefix("torch.")

    @contextmanager
    def _remembered(self, append: bool) -> Iterator[None]:
        """Inside, each layer has its state and the rotary embedding the chunk's position."""
        try:
            self.model.rope.first_frame = self.frames
            for layer, state in self.layers.items():
                state.appends, state.added = append, False
                layer.hand(state)
            yield
        finally:
            self.model.rope.first_frame = 0
            for layer in self.layers:
                layer.hand(None)
