"""Any transformer of text to image or text to video: the model, and what it learns."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mhla_gen.calls import Call, call_class
from mhla_gen.config import TrainConfig, TransformerConfig
from mhla_gen.data import TrainingData
from mhla_gen.errors import UserError
from mhla_gen.models.families import MHLA_CLASSES
from mhla_gen.pipelines.schedulers import prediction_of
from mhla_gen.training.lora import add_lora, merged
from mhla_gen.training.new_model import new_transformer
from mhla_gen.training.objectives import FlowMatching, Objective
from mhla_gen.training.pretrained import load_pretrained
from mhla_gen.training.scheduled import ScheduledNoise
from mhla_gen.training.task import Task, times
from mhla_gen.training.transformer_conditions import TransformerConditions, names_of
from mhla_gen.training.transformer_pipeline import CaptionExamples, CaptionSamples, TransformerParts


def transformer_task(config: TrainConfig, given: TransformerConfig, data: TrainingData) -> Task:
    """A transformer for images or clips with embedded captions.

    Args:
        config: Settings.
        given: Those of them that are about the transformer.
        data: A cache, or another data set with the tensors that the family's `Call` names, and
            `empty_prompt`, those of the empty caption.

    Raises:
        ValueError: If settings, data and a pretrained model do not fit together.
    """
    empty = _empty_prompt(data)
    if config.parallelism == "fsdp":
        raise UserError("parallelism=fsdp is for DiT and Wan; take parallelism=ddp")
    model = _build_model(config, given)
    parts = TransformerParts(config, given, data, call_class(model))
    call = parts.call(model)
    _check(call, data)
    # Wan VACE encodes a clip of each size, once.
    for shape in data.sample_shapes:
        call.further(torch.empty(1, *shape))
    if config.model.trainable == "lora":
        add_lora(model, given)
    shapes = ", ".join(map(times, data.sample_shapes))
    kind = "images" if call.rank == 2 else "clips"
    drawn = parts.has_autoencoder and call.draws
    return Task(
        model=model,
        objective=_objective(config, call, parts.scheduler),
        conditioning=TransformerConditions(call, empty),
        pipeline=parts.pipeline,
        any_length=not (call.pads and call.batches),
        finished=merged if config.model.trainable == "lora" else None,
        sampler=CaptionSamples(data, empty, parts) if drawn else None,
        sampling=parts.sampling(call),
        examples=CaptionExamples(parts.data, empty, parts).write if drawn else None,
        samples=kind,
        fps=parts.fps or 16.0,
        summary=f"{len(data)} captioned {kind}, latents {shapes}",
    )


def _empty_prompt(data: TrainingData) -> Mapping[str, Tensor]:
    empty = getattr(data, "empty_prompt", None)
    if empty is None:
        raise UserError(
            "transformer learns from embedded captions: data.source=cache with what `mhla-gen "
            "cache` wrote with text.path"
        )
    return empty


def _build_model(config: TrainConfig, given: TransformerConfig) -> Any:
    if config.model.pretrained is not None:
        if given.name is not None:
            raise UserError("transformer.name is of a new model; leave it or model.pretrained out")
        return load_pretrained(config.model)
    known = {base.__name__: base for base in MHLA_CLASSES}
    if given.name not in known:
        raise UserError(
            f"transformer.name must be one of {', '.join(known)}, found {given.name}; or give "
            "model.pretrained"
        )
    base: Any = known[given.name]
    call_class(base)
    return new_transformer(config.model, base, given.sizes, "transformer.sizes")


def _check(call: Call, data: TrainingData) -> None:
    """Raise unless the model takes what the data have."""
    name, config = type(call.pipe.transformer).__name__, call.config
    patch = call.patch(config)
    for shape in data.sample_shapes:
        if len(shape) != call.rank + 1:
            kind = "images" if call.rank == 2 else "clips"
            raise UserError(f"{name} takes latents of {kind}, the data have {times(shape)}")
        if shape[0] != call.channels(config):
            raise UserError(
                f"{name} takes latents of {call.channels(config)} channels, the data have "
                f"{times(shape)}"
            )
        if any(n % p for n, p in zip(shape[1:], patch, strict=True)):
            raise UserError(
                f"{name}'s tokens are {times(patch)} latents, which do not tile {times(shape)}"
            )
    found = data.read([data.buckets[0][0]])
    missing = [wanted for wanted in names_of(call) if wanted not in found]
    if missing:
        raise UserError(
            f"{name} reads {', '.join(missing)}, which the data do not have; build the cache with "
            f"text.path, a {call.pipeline}"
        )
    for row in call.embedded(config).values():
        wanted = None if row.channels is None else config[row.channels]
        if wanted is not None and found[row.name].shape[-1] != wanted:
            raise UserError(
                f"{name} does not fit: {row.channels} is {wanted}, but {row.name} of the data has "
                f"{found[row.name].shape[-1]} channels"
            )


def _objective(config: TrainConfig, call: Call, scheduler: Any) -> Objective:
    """What the model was made to predict."""
    asked, name = config.objective, type(call.pipe.transformer).__name__
    flow = prediction_of(scheduler) == "flow_prediction"
    if flow and asked.name != "flow_matching":
        raise UserError(f"{name} needs objective.name=flow_matching, found {asked.name}")
    if flow:
        return FlowMatching(asked.logit_mean, asked.logit_std, asked.shift, asked.min_snr_gamma)
    found = ScheduledNoise(scheduler)
    if (asked.name, asked.prediction) != ("ddpm", found.prediction_type):
        raise UserError(
            f"{name} predicts {found.prediction_type} at the noise levels of a "
            f"{type(scheduler).__name__}: it needs objective.name=ddpm and "
            f"objective.prediction={found.prediction_type}"
        )
    if asked.min_snr_gamma is not None:
        raise UserError(f"objective.min_snr_gamma is not for a {name}; leave it out")
    return found
