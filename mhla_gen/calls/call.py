"""What a family's pipeline does between its latents and its transformer."""

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

# Names in pipelines of a latent's size in pixels and frames.
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
    """Its name in the pipeline and in a batch of training data."""
    channels: str | None = None
    """Setting of the transformer that gives the size of its last axis; None for a mask."""
    tokens: int | None = None
    """Default size of its first axis; None for one vector per caption."""


class Call:
    """How one kind of transformer is called: the defaults, which families override.

    Latents are those of the data, `[batch, channels, (frames,) height, width]`, normalised;
    timesteps are `[batch]` in [0, 1000], where 1000 is pure noise.

    Args:
        pipe: The pipeline of the transformer; parts that are not called may be None.
        guidance: Guidance scale passed to a guidance-distilled model; None takes the default of its
            pipeline.
        fps: Frames per second of clips; None takes the default of the pipeline.

    Source:
        diffusers 0.42, the pipelines that the classes name.
    """

    base_class: ClassVar[type]
    """The diffusers transformer; its converted class is covered, too."""
    pipeline: ClassVar[str]
    """The diffusers pipeline for text to image or text to video."""
    rank: ClassVar[int] = 2
    """Number of axes of the latents: 3 with frames."""
    text: ClassVar[dict[str, Embedded]]
    """Argument of the transformer → tensor of a caption. An argument is left out if its channels
    are None in the transformer's settings."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Other tensors of a batch that the call reads, which do not come from captions."""
    returned: ClassVar[tuple[str | None, ...]]
    """Names of what `encode_prompt` returns, by position; None for results that are not needed."""
    pads: ClassVar[bool] = True
    """Whether the pipeline pads every caption to one length. Otherwise `prompt_embeds` are cut to
    the tokens valid in `prompt_embeds_mask`, and padded with zeros to the longest of a batch."""
    batches: ClassVar[bool] = True
    """Whether the pipeline embeds a caption alike in every batch, but for what `pads` says."""
    packing: ClassVar[int] = 1
    """Number of latents along each side that the pipeline packs into the channels of a token."""
    scheduler: ClassVar[tuple[type, dict[str, Any]]] = (FlowMatchEulerDiscreteScheduler, {})
    """Scheduler class and settings that the model was trained for, if no pipeline provides them."""
    draws: ClassVar[bool] = True
    """Whether the pipeline samples from embedded captions and noise only."""
    sign: ClassVar[int] = 1
    """−1 if the model predicts the negative of the training target."""

    def __init__(self, pipe: Any, guidance: float | None = None, fps: float | None = None):
        self.pipe = pipe
        self.config: Any = getattr(pipe.transformer, "config", None)
        self._guidance, self._fps = guidance, fps

    @classmethod
    def assemble(cls, transformer: Any, **parts: Any) -> Any:
        """The pipeline of a transformer; parts that are not given are None or the default."""
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
        """Number of latent channels of a transformer with this config."""
        return config.in_channels // cls.packing**2

    @classmethod
    def patch(cls, config: Any) -> tuple[int, ...]:
        """Number of latents along each axis in one token."""
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
        """Guidance scale passed to a guidance-distilled model."""
        given = inspect.signature(self.pipe.__call__).parameters["guidance_scale"].default
        return given if self._guidance is None else self._guidance

    def fps(self, usual: float) -> float:
        """Frames per second; by default the usual value of the family."""
        return usual if self._fps is None else self._fps

    def arguments(
        self, latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """The arguments of a call of the transformer.

        Args:
            latents: Noisy latents.
            timesteps: Timestep of each sample.
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
        """Latents in the transformer's format."""
        return latents

    def unpack(self, output: Any, latents: Tensor) -> Tensor:
        """Undo `pack` on the transformer's output."""
        return output

    def times(self, timesteps: Tensor) -> Tensor:
        """Timesteps in the transformer's format."""
        return timesteps

    def further(self, latents: Tensor) -> dict[str, Any]:
        """Further arguments, which are constant or depend only on the size of the latents."""
        return {}

    def prediction(self, output: Any, latents: Tensor) -> Tensor:
        """The prediction (the velocity, or another target), shaped like the latents.

        Some transformers also predict a variance, which is dropped, as in their pipelines.

        Args:
            output: Output of the transformer with `return_dict=False`.
            latents: The latents that it was called with.
        """
        found = self.unpack(output[0] if isinstance(output, tuple) else output, latents)
        if found.shape[1] == 2 * latents.shape[1]:
            found = found.chunk(2, dim=1)[0]
        return found if self.sign == 1 else -found

    def embed(self, captions: Sequence[str], max_length: int | None) -> dict[str, Tensor]:
        """Embed captions with the pipeline's own text encoders.

        Args:
            captions: Any number of captions.
            max_length: Maximum number of tokens of a caption; longer ones are truncated. None takes
                the pipeline's own limit.

        Returns:
            Tensors by the names in `text`, each `[captions, …]`.

        Raises:
            ValueError: If the pipeline does not accept a maximum length.
        """
        return self.named(self.encode(captions, max_length))

    def encode(self, captions: Sequence[str], max_length: int | None, **options: Any) -> Any:
        """The results of the pipeline's `encode_prompt`.

        Args:
            captions: As in `embed`.
            max_length: As in `embed`.
            options: Further arguments of `encode_prompt`.

        Raises:
            ValueError: If the pipeline does not accept a maximum length.
        """
        function = self.pipe.encode_prompt
        known = inspect.signature(function).parameters
        if max_length is not None and "max_sequence_length" not in known:
            raise UserError(f"a {self.pipeline} cuts captions itself; set no max_sequence_length")
        called = inspect.signature(self.pipe.__call__).parameters
        # The pipeline has its own defaults for some arguments, such as the prefix of a caption.
        given: dict[str, Any] = {n: called[n].default for n in known if n in called}
        given |= {
            # Further encoders get the same prompts.
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
        """The tensors of one caption, without the padding to the longest of a batch."""
        if self.pads:
            return row
        valid = row["prompt_embeds_mask"].bool()
        cut = {name: row[name][valid] for name in ("prompt_embeds", "prompt_embeds_mask")}
        return row | cut

    def named(self, found: Sequence[Any]) -> dict[str, Tensor]:
        """The results of `encode_prompt` by name; a mask that it does not return is all ones."""
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
        """Arguments of the pipeline in place of prompts.

        Args:
            captions: Tensors by the names in `text`.
            negative: The same for negative prompts, if the pipeline takes them.
        """
        found: dict[str, Any] = dict(captions)
        if negative is not None:
            negated = {f"negative_{name}": value for name, value in negative.items()}
            found |= {name: value for name, value in negated.items() if self.takes(name)}
            if self.takes("negative_prompt"):
                # Some pipelines default to an empty prompt, and refuse it beside embeddings.
                found["negative_prompt"] = None
        return found

    def takes(self, name: str) -> bool:
        """Whether the pipeline has an argument with this name."""
        return name in inspect.signature(self.pipe.__call__).parameters

    def sizes(self, latents: Tensor) -> tuple[int, ...]:
        """Size of latents along each axis in frames and pixels, as the pipeline counts them."""
        height, width = (n * self._scale(_SPATIAL, 8) for n in latents.shape[-2:])
        if self.rank == 2:
            return height, width
        return (latents.shape[2] - 1) * self._scale(_TEMPORAL, 4) + 1, height, width

    def latent_sizes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Latents along each axis of samples of these sizes; undoes `sizes`."""
        frames, *sides = self.sizes(torch.empty(1, 1, *(2,) * self.rank, device="meta"))
        if self.rank == 2:
            return tuple(2 * size // n for size, n in zip(sizes, (frames, *sides), strict=True))
        pixels = (2 * size // n for size, n in zip(sizes[1:], sides, strict=True))
        return (sizes[0] - 1) // (frames - 1) + 1, *pixels

    def _scale(self, names: tuple[str, ...], usual: int) -> int:
        return next((getattr(self.pipe, name) for name in names if hasattr(self.pipe, name)), usual)
