"""From settings to a sampler: the pipeline, ready to run, and what to sample."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mhla_gen.config import SampleConfig
from mhla_gen.errors import UserError
from mhla_gen.pipelines.class_conditional import ClassConditionalPipeline
from mhla_gen.pipelines.classes import class_numbers
from mhla_gen.pipelines.guidance import Guidance
from mhla_gen.pipelines.schedulers import makes_variance, other_scheduler
from mhla_gen.runtime.compiling import compile_blocks
from mhla_gen.runtime.cuda_graphs import RecordedForward
from mhla_gen.sampling.embeds import embedded_names, read_embeds
from mhla_gen.sampling.labels import class_labels, ordered_labels
from mhla_gen.sampling.prompt_sampler import PromptSampler
from mhla_gen.sampling.prompts import Prompt, missing_prompts, read_prompts
from mhla_gen.sampling.samplers import ClassSampler, Sampler
from mhla_gen.sampling.saved_pipeline import load_with_settings

_SAMPLES_PER_CLASS = 10


def build_sampler(config: SampleConfig) -> tuple[SampleConfig, Sampler]:
    """The pipeline on the CPU, with the requested scheduler, and the samples to make.

    Returns:
        The config with the pipeline's own settings where it gives none, and the samples.

    Raises:
        FileNotFoundError: If the pipeline or a file with prompts is missing.
        ValueError: If settings and pipeline do not fit together.
    """
    config, pipeline = load_with_settings(config)
    of_classes = isinstance(pipeline, ClassConditionalPipeline)
    if config.scheduler is not None or config.scheduler_options:
        pipeline.scheduler = other_scheduler(
            pipeline.scheduler,
            config.scheduler,
            config.scheduler_options,
            prediction_type=pipeline.prediction_type if of_classes else None,
            learned_variance=of_classes and makes_variance(pipeline.transformer),
        )
    pipeline.set_progress_bar_config(disable=True)
    if config.vae_tiling:
        if not hasattr(getattr(pipeline, "vae", None), "enable_tiling"):
            raise UserError(
                f"vae_tiling=true, but this {type(pipeline).__name__} has no tiling; leave it out"
            )
        pipeline.vae.enable_tiling()
    build = _of_classes if of_classes else _of_prompts
    return config, build(config, pipeline)


def _of_classes(config: SampleConfig, pipeline: ClassConditionalPipeline) -> ClassSampler:
    for key in ("prompts", "prompt_embeds", "image", "num_frames", "guidance_scale_2"):
        if getattr(config, key) is not None:
            raise UserError(
                f"{key} is set, but {config.pipeline} is class-conditional; leave it out"
            )
    if config.height != config.width:
        raise UserError(
            "class-conditional images are square: height and width must be equal, found "
            f"{config.height} and {config.width}"
        )
    multiple = pipeline.size_multiple
    if config.height is not None and (config.height < 1 or config.height % multiple):
        raise UserError(
            f"height and width must be multiples of {multiple} for {config.pipeline}, found "
            f"{config.height}"
        )
    assert config.guidance_scale is not None and config.num_inference_steps is not None
    guidance = Guidance(config.guidance_scale, config.guidance_interval, config.guidance_channels)
    guidance.check_channels(pipeline.transformer.config.in_channels)
    _check_steps(pipeline.scheduler, config.num_inference_steps)
    return ClassSampler(
        pipeline,
        _labels(config, pipeline.class_names),
        seed=config.seed,
        guidance_scale=guidance.scale,
        guidance_interval=guidance.interval,
        guidance_channels=guidance.channels,
        image_size=config.height,
    )


def _check_steps(scheduler: Any, steps: int) -> None:
    # Some settings are only read here.
    try:
        scheduler.set_timesteps(steps)
    except (TypeError, ValueError, RuntimeError) as error:
        name, reason = type(scheduler).__name__, str(error).splitlines()[0]
        raise UserError(f"{name} cannot make num_inference_steps={steps}: {reason}") from error


def _labels(config: SampleConfig, names: list[str]) -> np.ndarray:
    classes, known = class_numbers(config.classes, names), len(names)
    if config.num_samples is None:
        return class_labels(classes, config.samples_per_class or _SAMPLES_PER_CLASS, known)
    return ordered_labels(classes, config.num_samples, config.order, config.seed, known)


def _of_prompts(config: SampleConfig, pipeline: Any) -> PromptSampler:
    name = type(pipeline).__name__
    unused = {
        "classes": config.classes != "all",
        "samples_per_class": config.samples_per_class is not None,
        "num_samples": config.num_samples is not None,
        "guidance_interval": config.guidance_interval != (0.0, 1.0),
        "guidance_channels": config.guidance_channels is not None,
    }
    for key, given in unused.items():
        if given:
            raise UserError(
                f"{key} is set, but the {name} in {config.pipeline} takes prompts; leave it out"
            )
    prompts, embeds = _prompts(config, pipeline)
    if prompts is None:
        raise UserError(missing_prompts(name, config.pipeline))
    return PromptSampler(
        pipeline,
        [_completed(config, prompt) for prompt in prompts],
        seed=config.seed,
        samples_per_prompt=config.samples_per_prompt,
        embeds=embeds,
        sizes={key: getattr(config, key) for key in ("height", "width", "num_frames")},
        guidance_scale=config.guidance_scale,
        guidance_scale_2=config.guidance_scale_2,
    )


def _prompts(config: SampleConfig, pipeline: Any) -> tuple[list[Prompt] | None, Any]:
    prompts = None if config.prompts is None else read_prompts(config.prompts)
    if config.prompt_embeds is None:
        return prompts, None
    guided = config.guidance_scale is not None and config.guidance_scale > 1
    names = embedded_names(pipeline, guided)
    embeds = read_embeds(config.prompt_embeds, None if prompts is None else len(prompts), names)
    if prompts is None:
        prompts = [Prompt(f"prompt {i}") for i in range(len(embeds[next(iter(names))]))]
    return prompts, embeds


def _completed(config: SampleConfig, prompt: Prompt) -> Prompt:
    """A prompt with the config's values where it has none of its own."""
    negative = config.negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt
    return replace(prompt, negative_prompt=negative, image=prompt.image or config.image)


def place(config: SampleConfig, pipeline: Any, device: torch.device) -> None:
    """Move a pipeline to its device, or offload it, and compile its layers.

    Compiled images of classes on a GPU are drawn by recorded passes: their models are small.

    Raises:
        ValueError: If it cannot be offloaded here.
    """
    if config.offload == "none":
        pipeline.to(device)
    elif device.type == "cpu":
        raise UserError(f"offload={config.offload} needs a GPU, found none; use offload=none")
    elif config.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
    if config.compile:
        for name, model in pipeline.components.items():
            if name.startswith("transformer") and model is not None:
                compile_blocks(model, repeatable=config.reproducible)
        if (
            device.type == "cuda"
            and config.offload == "none"
            and isinstance(pipeline, ClassConditionalPipeline)
        ):
            pipeline.transformer.forward = RecordedForward(pipeline.transformer.forward)
