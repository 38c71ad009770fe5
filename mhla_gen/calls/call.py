"""What a family's pipeline does between latents and its transformer."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from mhla_gen.errors import UserError

# What pipelines call pixels and frames of a latent.
_SPATIAL = (
    "vae_scale_factor",
    "vae_scale_factor_spatial",
    "vae_spatial_compression_ratio",
    "vae_spatial_scale_factor",
)
_TEMPORAL = (
    "vae_scale_factor_temporal",
    "vae_temporal_compression_ratio",
    "vae_temporal_scale_factor",
)


class Embedded(NamedTuple):
    """One tensor of an embedded caption."""

    name: str
    """What the pipeline calls it, and a batch of training data."""
    channels: str | None = None
    """Setting of the transformer that is its last axis; None for a mask."""
    tokens: int | None = None
    """Its first axis where nothing says otherwise; None for one vector a caption."""


class Call:
    """How one kind of transformer is called: defaults of what families differ in.

    Latents are those of the data, `[batch, channels, (frames,) height, width]`, normalised;
    timesteps are `[batch]` in [0, 1000], 1000 for noise alone.

    Args:
        pipe: The pipeline of the transformer; parts that are not called may be None.
        guidance: What a model that was distilled to follow guidance is told; None takes the
            default of its pipeline.
        fps: Frames per second of clips; None takes the default of the pipeline.

    Source:
        diffusers 0.42, the pipelines that the classes name.
    """

    base_class: ClassVar[type]
    """The diffusers transformer, and with it what it becomes when converted."""
    pipeline: ClassVar[str]
    """The diffusers pipeline, of text to image or text to video."""
    rank: ClassVar[int] = 2
    """Axes of the latents: 3 with frames."""
    text: ClassVar[dict[str, Embedded]]
    """Argument of the transformer → tensor of a caption. One whose channels the transformer's
    settings say to be None is left out."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Further tensors of a batch that the call reads, which no caption is embedded to."""
    returned: ClassVar[tuple[str | None, ...]]
    """What `encode_prompt` returns, by position; None for what is not needed."""
    pads: ClassVar[bool] = True
    """Whether the pipeline pads every caption to one length; else `prompt_embeds` are cut to what
    `prompt_embeds_mask` leaves, and padded with zeros to the longest of a batch."""
    packing: ClassVar[int] = 1
    """Latents along each side that the pipeline packs into the channels of a token."""
    scheduler: ClassVar[tuple[type, dict[str, Any]]] = (FlowMatchEulerDiscreteScheduler, {})
    """Class and settings of the noise that the model was made for, where no pipeline says it."""
    draws: ClassVar[bool] = True
    """Whether the pipeline draws from embedded captions and noise alone."""
    sign: ClassVar[int] = 1
    """−1 where the model predicts the negative of what is asked for."""

    def __init__(self, pipe: Any, guidance: float | None = None, fps: float | None = None):
        self.pipe = pipe
        self.config: Any = getattr(pipe.transformer, "config", None)
        self._guidance, self._fps = guidance, fps

    @classmethod
    def assemble(cls, transformer: Any, **parts: Any) -> Any:
        """The pipeline of a transformer; what is not given is None, or its default."""
        kind = getattr(diffusers, cls.pipeline)
        needed = inspect.signature(kind.__init__).parameters
        absent = {
            name: None
            for name, p in needed.items()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name != "self"
        }
        return kind(**absent | parts | {"transformer": transformer})

    @classmethod
    def channels(cls, config: Any) -> int:
        """Channels of the latents of a transformer with this config."""
        return config.in_channels // cls.packing**2

    @classmethod
    def patch(cls, config: Any) -> tuple[int, ...]:
        """Latents along each axis that are one token."""
        sides = config.patch_size if cls.packing == 1 else cls.packing
        sides = (sides,) * 2 if isinstance(sides, int) else tuple(sides)
        time = getattr(config, "patch_size_t", None) or 1
        return sides if len(sides) == cls.rank else (time,) * (cls.rank - 2) + sides

    @classmethod
    def embedded(cls, config: Any) -> dict[str, Embedded]:
        """`text` of a transformer with this config."""
        return {
            argument: row
            for argument, row in cls.text.items()
            if row.channels is None or config.get(row.channels) is not None
        }

    @property
    def guidance(self) -> float:
        """What is told to a model that follows guidance."""
        given = inspect.signature(self.pipe.__call__).parameters["guidance_scale"].default
        return given if self._guidance is None else self._guidance

    def fps(self, usual: float) -> float:
        """Frames per second, or else what is usual for the family."""
        return usual if self._fps is None else self._fps

    def arguments(
        self, latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """What the transformer is called with.

        Args:
            latents: Noisy.
            timesteps: Of each sample.
            text: Tensors of the captions by their names in `text`.
        """
        rows = self.embedded(self.config)
        return {
            "hidden_states": self.pack(latents),
            "timestep": self.times(timesteps),
            **{argument: text[row.name] for argument, row in rows.items()},
            **self.further(latents),
        }

    def pack(self, latents: Tensor) -> Tensor:
        """What the transformer takes for latents."""
        return latents

    def unpack(self, output: Any, latents: Tensor) -> Tensor:
        """Undo `pack` on the transformer's output."""
        return output

    def times(self, timesteps: Tensor) -> Tensor:
        """What the transformer takes for timesteps."""
        return timesteps

    def further(self, latents: Tensor) -> dict[str, Any]:
        """Arguments that follow from the size of the latents, or are the same for all."""
        return {}

    def prediction(self, output: Any, latents: Tensor) -> Tensor:
        """The velocity, or what else is asked for, like the latents.

        A variance that some transformers predict beside it is left out, as their pipelines do.

        Args:
            output: What the transformer returned with `return_dict=False`.
            latents: Those that it was called for.
        """
        found = self.unpack(output[0] if isinstance(output, tuple) else output, latents)
        if found.shape[1] == 2 * latents.shape[1]:
            found = found.chunk(2, dim=1)[0]
        return found if self.sign == 1 else -found

    def embed(self, captions: Sequence[str], max_length: int | None) -> dict[str, Tensor]:
        """Captions by the pipeline's own text encoders.

        Args:
            captions: Any number.
            max_length: Tokens after which one is cut; None takes the pipeline's own.

        Returns:
            Tensors by the names in `text`, each `[captions, …]`.

        Raises:
            ValueError: If the pipeline takes no such length.
        """
        return self.named(self.encode(captions, max_length))

    def encode(self, captions: Sequence[str], max_length: int | None, **options: Any) -> Any:
        """What `encode_prompt` returns."""
        function = self.pipe.encode_prompt
        known = inspect.signature(function).parameters
        if max_length is not None and "max_sequence_length" not in known:
            raise UserError(f"a {self.pipeline} cuts captions itself; set no max_sequence_length")
        called = inspect.signature(self.pipe.__call__).parameters
        # The pipeline has defaults of its own for some, such as what a caption begins with.
        given: dict[str, Any] = {n: called[n].default for n in known if n in called}
        given |= {
            # Prompts of further encoders: the same.
            "prompt_2": None,
            "prompt_3": None,
            "do_classifier_free_guidance": False,
            "batch_size": len(captions),
            # The pipeline would ask its first part, which need not be a text encoder.
            "device": self.pipe.text_encoder.device,
            "prompt": list(captions),
        }
        if max_length is not None:
            given["max_sequence_length"] = max_length
        given = {name: value for name, value in given.items() if name in known}
        return function(**given | options)

    def cut(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one caption without padding to the longest of a batch."""
        if self.pads:
            return row
        valid = row["prompt_embeds_mask"].bool()
        cut = {name: row[name][valid] for name in ("prompt_embeds", "prompt_embeds_mask")}
        return row | cut

    def named(self, found: Sequence[Any]) -> dict[str, Tensor]:
        """What `encode_prompt` returned, by name; a mask that it left out is all ones."""
        pairs = zip(self.returned, found, strict=False)
        named: dict[str, Any] = {name: value for name, value in pairs if name is not None}
        for name in [name for name, value in named.items() if isinstance(value, list)]:
            lengths = torch.tensor([len(row) for row in named[name]])
            named[f"{name}_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            named[name] = torch.nn.utils.rnn.pad_sequence(named[name], batch_first=True)
        for name in [name for name, value in named.items() if value is None]:
            embeds = named["prompt_embeds"]
            named[name] = embeds.new_ones(embeds.shape[:2], dtype=torch.int64)
        return named

    def texts(
        self, captions: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """What the pipeline itself is called with, in place of prompts.

        Args:
            captions: Tensors by the names in `text`.
            negative: The same for what guidance leads away from, where it has that.
        """
        found: dict[str, Any] = dict(captions)
        if negative is not None:
            negated = {f"negative_{name}": value for name, value in negative.items()}
            found |= {name: value for name, value in negated.items() if self.takes(name)}
            if self.takes("negative_prompt"):
                # Some pipelines have an empty one by default, and refuse both.
                found["negative_prompt"] = None
        return found

    def takes(self, name: str) -> bool:
        """Whether the pipeline has an argument of this name."""
        return name in inspect.signature(self.pipe.__call__).parameters

    def sizes(self, latents: Tensor) -> tuple[int, ...]:
        """Pixels, and frames, of latents along each axis, as the pipeline counts them."""
        height, width = (n * self._scale(_SPATIAL, 8) for n in latents.shape[-2:])
        if self.rank == 2:
            return height, width
        return (latents.shape[2] - 1) * self._scale(_TEMPORAL, 4) + 1, height, width

    def _scale(self, names: tuple[str, ...], usual: int) -> int:
        return next((getattr(self.pipe, name) for name in names if hasattr(self.pipe, name)), usual)
