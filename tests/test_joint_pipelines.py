"""diffusers' own pipelines, with MHLA where text and image share one attention."""

import inspect

import diffusers
import pytest
import torch
from tiny_autoencoders import (
    autoencoder,
    autoencoder_of_cogvideox,
    autoencoder_of_hunyuan,
    autoencoder_of_mochi,
    autoencoder_of_qwen,
    shifted,
)
from tiny_joint import (
    TEXT_MASK,
    tiny_cogvideox,
    tiny_flux,
    tiny_flux2,
    tiny_hunyuan_video,
    tiny_mochi,
    tiny_qwen_image,
    tiny_sd3,
    tiny_z_image,
)

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.errors import UserError
from mhla_gen.sampling.prompt_sampler import PromptSampler
from mhla_gen.sampling.prompts import Prompt

IMAGE = {"height": 64, "width": 96, "num_inference_steps": 2, "output_type": "latent"}
CLIP = IMAGE | {"height": 80, "num_frames": 9}


def guided(call, **embeds):
    """With negative prompts beside the prompts."""
    negative = {f"negative_{name}": value for name, value in embeds.items()}
    return call | embeds | negative


def text(channels):
    return torch.randn(1, 7, channels)


def pooled():
    return torch.randn(1, 8)


# Pipeline → its transformer, its autoencoder, and what it is called with.
PIPELINES = {
    "StableDiffusion3Pipeline": lambda: (
        tiny_sd3(),
        shifted(),
        guided(IMAGE, prompt_embeds=text(12), pooled_prompt_embeds=pooled()),
    ),
    "FluxPipeline": lambda: (
        tiny_flux(in_channels=16),
        shifted(),
        IMAGE | {"prompt_embeds": text(16), "pooled_prompt_embeds": pooled()},
    ),
    "Flux2Pipeline": lambda: (
        tiny_flux2(in_channels=16),
        autoencoder(diffusers.AutoencoderKLFlux2),
        IMAGE | {"prompt_embeds": text(16)},
    ),
    "QwenImagePipeline": lambda: (
        tiny_qwen_image(in_channels=16, out_channels=4),
        autoencoder_of_qwen(),
        guided(IMAGE, prompt_embeds=text(16), prompt_embeds_mask=torch.tensor(TEXT_MASK)),
    ),
    "ZImagePipeline": lambda: (
        tiny_z_image(),
        shifted(),
        guided(IMAGE, prompt_embeds=[text(16)[0]]),
    ),
    "CogVideoXPipeline": lambda: (
        tiny_cogvideox(),
        autoencoder_of_cogvideox(),
        guided(CLIP, prompt_embeds=text(16)),
    ),
    "HunyuanVideoPipeline": lambda: (
        tiny_hunyuan_video(guidance_embeds=True),
        autoencoder_of_hunyuan(),
        CLIP
        | {"prompt_embeds": text(16), "pooled_prompt_embeds": pooled()}
        | {"prompt_attention_mask": torch.tensor(TEXT_MASK)},
    ),
    "MochiPipeline": lambda: (
        tiny_mochi(),
        autoencoder_of_mochi(),
        guided(
            CLIP | {"num_frames": 7},
            prompt_embeds=text(16),
            prompt_attention_mask=torch.tensor(TEXT_MASK),
        ),
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_draws_with_mhla_and_without_again(name, tmp_path):
    transformer, vae, call = PIPELINES[name]()
    kind = getattr(diffusers, name)
    of_noise = name == "CogVideoXPipeline"
    scheduler = diffusers.CogVideoXDDIMScheduler if of_noise else None
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler()}
    absent = {part: None for part in kind._get_signature_keys(kind)[0] if part not in parts}

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(**call, generator=torch.Generator().manual_seed(0))[0]

    pipe = kind(**parts, **absent)
    softmax = draw(pipe)
    mhla_gen.inject(pipe, MHLAConfig(exact=0.3))
    converted = draw(pipe)
    assert converted.isfinite().all() and not torch.equal(converted, softmax)
    pipe.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, **absent)
    assert type(loaded.transformer) is type(pipe.transformer)
    assert torch.equal(draw(loaded), converted)
    mhla_gen.save_adapter(pipe, tmp_path / "adapter")
    assert torch.equal(draw(mhla_gen.restore(pipe)), softmax)
    assert torch.equal(draw(mhla_gen.load_adapter(pipe, tmp_path / "adapter")), converted)


class Asked(Exception):
    """Carries the sizes that a pipeline draws noise of."""


@pytest.mark.parametrize("name", PIPELINES)
def test_sizes_left_out_are_the_pipelines_own(name, monkeypatch):
    transformer, vae, call = PIPELINES[name]()
    kind = getattr(diffusers, name)
    parts = {"transformer": transformer, "vae": vae}
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = kind(**{part: parts.get(part) for part in kind._get_signature_keys(kind)[0]})
    sizes = ("height", "width", "num_frames")
    embeds = {key: value for key, value in call.items() if "embeds" in key or "mask" in key}

    def sampler(**given):
        return PromptSampler(pipe, [Prompt("up")], seed=0, embeds=embeds, sizes=given)

    if name == "ZImagePipeline":  # its sizes are in the body of its __call__
        with pytest.raises(UserError, match="does not say its own height; set height"):
            sampler(height=None, width=None)
        return
    bind = inspect.signature(pipe.prepare_latents).bind

    def asked(*args, **kwargs):
        raise Asked(bind(*args, **kwargs).arguments)

    monkeypatch.setattr(pipe, "prepare_latents", asked)
    with pytest.raises(Asked) as found:
        pipe(**{key: value for key, value in call.items() if key not in sizes})
    found = {key: value for key, value in found.value.args[0].items() if key in sizes}
    given = dict.fromkeys(sizes if "num_frames" in found else sizes[:2])
    expected = tuple(found[key] for key in ("num_frames", "height", "width") if key in found)
    assert sampler(**given).shape == (*expected, 3)
