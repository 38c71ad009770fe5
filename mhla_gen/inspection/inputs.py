"""Inputs of an inspected model: noise, or images with noise, and a condition."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from mhla_gen.calls import Call, call_class
from mhla_gen.config import InputsConfig
from mhla_gen.data import ArrayImages, EncodedImages, derived_seed, open_images
from mhla_gen.errors import UserError
from mhla_gen.inspection.subject import Subject
from mhla_gen.pipelines.schedulers import prediction_of

_NUM_TIMESTEPS = 1000


class Caller(Protocol):
    """How a model is called; see `mhla_gen.calls.Call`."""

    def arguments(
        self, latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Arguments of the transformer."""
        ...

    def prediction(self, output: Any, latents: Tensor) -> Tensor:
        """Its prediction for the latents."""
        ...


class _ByClass:
    """diffusers' DiT."""

    def arguments(
        self, latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """See `Caller`."""
        return {**text, "hidden_states": latents, "timestep": timesteps}

    def prediction(self, output: Any, latents: Tensor) -> Tensor:
        """See `Caller`."""
        return output[0]


@dataclass(frozen=True, eq=False)
class Input:
    """Inputs of one timestep, or of several, and how to call the model with them."""

    title: str
    latents: Tensor
    timesteps: Tensor
    condition: dict[str, Tensor]
    """Labels or embedded captions, by name."""
    caller: Caller

    @property
    def arguments(self) -> dict[str, Any]:
        """What the model is called with."""
        return self.caller.arguments(self.latents, self.timesteps, self.condition)

    def predicted(self, model: Any) -> Tensor:
        """What a model predicts, on its device."""
        device = next(model.parameters()).device
        here = self.on(device)
        output = model(**here.arguments, return_dict=False)
        return here.caller.prediction(output, here.latents)

    def on(self, device: torch.device) -> "Input":
        """The same on a device."""
        condition = {name: value.to(device) for name, value in self.condition.items()}
        moved = {"latents": self.latents.to(device), "timesteps": self.timesteps.to(device)}
        return replace(self, condition=condition, **moved)


def joined(inputs: Sequence[Input]) -> Input:
    """Inputs of one sample each as one batch."""

    def cat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    names = inputs[0].condition
    return replace(
        inputs[0],
        latents=cat(item.latents for item in inputs),
        timesteps=cat(item.timesteps for item in inputs),
        condition={name: cat(item.condition[name] for item in inputs) for name in names},
    )


@dataclass(frozen=True, eq=False)
class _Start:
    """Clean latents, if any, and the class that belongs to them."""

    latents: Tensor | None
    label: int


def make_inputs(
    subject: Subject,
    config: InputsConfig,
    grid: tuple[int, ...],
    images: ArrayImages | EncodedImages | None = None,
) -> list[Input]:
    """All inputs of an inspection, one for every timestep and sample, batch size 1, on the CPU.

    The same config gives the same inputs to every model of the same size.

    Args:
        subject: The model.
        config: Settings.
        grid: Tokens along each axis.
        images: The images of `config.data`, if they are open already.

    Raises:
        ValueError: If the family has no recipe, or data or classes do not fit the model.
        OSError: If data are missing.
    """
    caller = _caller_of(subject.model)
    shape = latent_shape(subject.model, grid)
    dtype = getattr(torch, config.dtype)
    timesteps = config.timesteps or ((500,) if config.data else (999,))
    made = []
    for timestep in timesteps:
        for number, start in enumerate(_starts(subject, config, shape, images)):
            generator = torch.Generator().manual_seed(derived_seed(config.seed, number))
            latents = torch.randn(shape, generator=generator)
            if start.latents is not None:
                latents = add_noise(subject.scheduler, start.latents, latents, timestep)
            title, condition = _condition(caller, start.label, generator)
            kind = "noise" if start.latents is None else f"{config.data and config.data.source}"
            made.append(
                Input(
                    title=f"{kind} {number}, {title}, timestep {timestep}",
                    latents=latents.to(dtype),
                    timesteps=torch.tensor([timestep]),
                    condition=_cast(condition, dtype),
                    caller=caller,
                )
            )
    return made


def latent_shape(model: Any, grid: tuple[int, ...]) -> tuple[int, ...]:
    """`(1, channels, …)` of the latents whose patches form a grid.

    Raises:
        ValueError: If calls of the model are not supported.
    """
    if isinstance(model, DiTTransformer2DModel):
        config: Any = model.config
        channels, patch = config.in_channels, (config.patch_size,) * 2
    else:
        call = call_class(model)
        channels, patch = call.channels(model.config), call.patch(model.config)
    return (1, channels, *(n * p for n, p in zip(grid, patch, strict=True)))


def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """Latents at a timestep, as the scheduler's training target has them.

    Raises:
        ValueError: If there is no scheduler to tell how.
    """
    if scheduler is None:
        raise UserError(
            "data need a pipeline folder: its scheduler says how much noise a timestep has; "
            "leave data out to inspect the model on noise alone"
        )
    if prediction_of(scheduler) == "flow_prediction":
        sigma = timestep / _NUM_TIMESTEPS
        return (1 - sigma) * latents + sigma * noise
    return scheduler.add_noise(latents, noise, torch.tensor([timestep]))


def _starts(
    subject: Subject,
    config: InputsConfig,
    shape: tuple[int, ...],
    images: ArrayImages | EncodedImages | None,
) -> list[_Start]:
    if config.data is not None:
        return _images(images or open_images(config.data), config, shape)
    num_classes = getattr(subject.model.config, "num_embeds_ada_norm", None)
    classes = range(num_classes or 1) if config.classes == "all" else config.classes
    if num_classes and max(classes) >= num_classes:
        raise UserError(f"the model has classes 0…{num_classes - 1}, found {max(classes)}")
    return [_Start(None, classes[i % len(classes)]) for i in range(config.num_inputs)]


def _images(
    images: ArrayImages | EncodedImages, config: InputsConfig, shape: tuple[int, ...]
) -> list[_Start]:
    if tuple(images.image_shape) != shape[1:]:
        raise UserError(
            f"the data are {list(images.image_shape)} but the model takes {list(shape[1:])}; "
            "latent and video models are inspected on noise: leave data out"
        )
    order = np.random.default_rng(config.seed).permutation(len(images))
    batch = images.read([int(i) for i in order[: config.num_inputs]])
    pairs = zip(batch["samples"], batch["labels"], strict=True)
    return [_Start(x[None], int(label)) for x, label in pairs]


def _caller_of(model: Any) -> Caller:
    if isinstance(model, DiTTransformer2DModel):
        return _ByClass()
    kind = call_class(model)
    if kind.beside:
        raise UserError(
            f"a {type(model).__name__} reads {', '.join(kind.beside)}, which inspect cannot make up"
        )
    return kind(kind.assemble(model))


def _condition(
    caller: Caller, label: int, generator: torch.Generator
) -> tuple[str, dict[str, Tensor]]:
    """A class, or random embeddings: no text encoder is needed."""
    if not isinstance(caller, Call):
        return f"class {label}", {"class_labels": torch.tensor([label])}
    found = {}
    for row in caller.embedded(caller.config).values():
        axes = () if row.tokens is None else (row.tokens,)
        if row.channels is None:
            found[row.name] = torch.ones(1, *axes, dtype=torch.int64)
        else:
            size = (1, *axes, caller.config[row.channels])
            found[row.name] = torch.randn(size, generator=generator)
    return "random text embedding", found


def _cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in arguments.items()}
