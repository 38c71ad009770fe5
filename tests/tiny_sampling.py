"""Tiny class-conditional pipelines, and sample sets of them."""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import disturb, tiny_dit, tiny_dit_pipeline

import mhla_gen
from mhla_gen import ClassConditionalPipeline, MHLAConfig
from mhla_gen.config import SampleConfig

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def tiny_pipeline(scheduler=None, num_classes=3, class_names=None, **changes):
    """Flow matching on grey pixels, 8 × 8."""
    size = {"in_channels": 1, "num_embeds_ada_norm": num_classes, "num_layers": 2}
    model = mhla_gen.inject(tiny_dit(**size | changes), MHLAConfig(layout=(2, 2)))
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    pipe = ClassConditionalPipeline(
        disturb(model), scheduler, class_names=class_names, prediction_type="flow_prediction"
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latent_pipeline(scheduler):
    """Noise and a variance learned on latents of a VAE, 64 × 64 in colour."""
    parts = tiny_dit_pipeline()
    model = mhla_gen.inject(parts.transformer, MHLAConfig(layout=(2, 2)))
    pipe = ClassConditionalPipeline(model, scheduler, vae=parts.vae, prediction_type="epsilon")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, labels=(0, 1, 2), **options):
    generators = [torch.Generator().manual_seed(i) for i in range(len(labels))]
    options = {"num_inference_steps": 3, "generator": generators, "output_type": "pt"} | options
    return pipe(labels, **options).images


def set_of(folder, pipeline, **changes):
    """Settings of a set in a folder, of the pipeline saved in another one."""
    settings = {"pipeline": str(pipeline), "output_dir": str(folder), "num_inference_steps": 2}
    return SampleConfig(**settings | changes)


def arrays_of(folder):
    with np.load(folder / "samples.npz") as arrays:
        return dict(arrays)
