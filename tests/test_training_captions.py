"""From captioned images and clips to samples: cache, train, preview, sample, by the commands."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_ltx, tiny_tokenizer, tiny_video
from tiny_autoencoders import autoencoder_of_ltx, shifted
from tiny_joint import tiny_sd3
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import mhla_gen
from mhla_gen.cli import main
from mhla_gen.config import SampleConfig, load_config
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.sampling.saved_pipeline import load_pipeline

SMALL = [
    "max_steps=2",
    "batch_size=2",
    "warmup_steps=0",
    "mixed_precision=fp32",
    "checkpoint_every=2",
    "sample_every=2",
    "samples.num_images=2",
    "samples.num_inference_steps=2",
    "samples.guidance_scale=2",
    "log_every=1",
    "report_to=none",
]


def t5(channels):
    sizes = {"vocab_size": 11, "d_model": channels, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    return T5EncoderModel(T5Config(**sizes, num_heads=2)).eval()


def clip():
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "projection_dim": 4}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 2}
    return CLIPTextModelWithProjection(CLIPTextConfig(**sizes)).eval()


def sd3_pipeline():
    torch.manual_seed(0)
    return diffusers.StableDiffusion3Pipeline(
        transformer=tiny_sd3(joint_attention_dim=16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(16),
        tokenizer_3=tiny_tokenizer(),
    )


def clip_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def ltx_pipeline():
    torch.manual_seed(0)
    return diffusers.LTXPipeline(
        transformer=tiny_ltx(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder_of_ltx(),
        text_encoder=t5(16),
        tokenizer=tiny_tokenizer(),
    )


def done(*arguments):
    assert main(list(arguments)) == 0


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """Folder with a Stable Diffusion 3 pipeline, and a cache of captioned images."""
    folder = tmp_path_factory.mktemp("sd3")
    sd3_pipeline().save_pretrained(folder / "base")
    rows = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        words = "a red square moves" if number % 2 else "a square"
        rows.append({"path": str(folder / f"{number}.png"), "caption": words})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done(
        "cache",
        f"output_dir={folder / 'cache'}",
        "data.source=list",
        f"data.path={folder / 'rows.jsonl'}",
        "data.image_size=64",
        f"vae.path={folder / 'base'}",
        f"text.path={folder / 'base'}",
        "text.dtype=float32",
        "device=cpu",
    )
    return folder


def test_a_cache_holds_what_the_pipeline_embeds(sd3):
    data = CachedLatents.open(sd3 / "cache")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3 / "base")
    embeds, empty, pooled, empty_pooled = pipe.encode_prompt("a red square moves", None, None)
    batch = data.read([1])
    # Embedded in another batch, so summed in another order: layers of float32 differ by a few
    # times 1e-6 of numbers up to 2.5, other texts and half precision by 1e-2.
    for found, expected in (
        (batch["prompt_embeds"], embeds),
        (batch["pooled_prompt_embeds"], pooled),
        (data.empty_prompt["prompt_embeds"], empty[0]),
        (data.empty_prompt["pooled_prompt_embeds"], empty_pooled[0]),
    ):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert data.caption(1) == "a red square moves"


def test_stable_diffusion_3_from_cache_to_sample(sd3, tmp_path, capsys):
    settings = [
        f"output_dir={tmp_path / 'run'}",
        "data.source=cache",
        f"data.path={sd3 / 'cache'}",
        f"model.pretrained={sd3 / 'base'}",
        "model.mhla.layout=[2,2]",
        "model.mhla.exact=0.3",
        "model.trainable=lora",
        "transformer.lora_rank=2",
        "transformer.lora_targets=[to_q,to_k,to_v]",
        *SMALL,
    ]
    done("train", *settings, "--dry-run")
    assert "4 captioned images, latents 4 × 8 × 8" in capsys.readouterr().out
    done("train", *settings)
    names = {path.name for path in (tmp_path / "run" / "previews").iterdir()}
    assert "samples-0000002.png" in names
    pipe = load_pipeline(str(tmp_path / "run"), torch.float32)
    assert type(pipe.transformer) is mhla_gen.MHLASD3Transformer2DModel
    # The noise of the pretrained pipeline is kept.
    assert pipe.scheduler.config.shift == 3.0
    example = tmp_path / "run" / "pipeline" / "examples"
    done(
        "sample",
        f"pipeline={tmp_path / 'run'}",
        f"prompt_embeds={example / 'prompt_embeds.safetensors'}",
        f"output_dir={tmp_path / 'samples'}",
        "device=cpu",
    )
    (picture,) = (tmp_path / "samples").rglob("0*.png")
    with Image.open(picture) as image:
        assert image.size == (64, 64)
    done("inspect", str(tmp_path / "run"), f"output_dir={tmp_path / 'page'}", "--dry-run")
    assert "4 × 4 = 16, the size of its run, 64 × 64 pixels" in capsys.readouterr().out
    # What was learned, on the base with its own text encoders, of the run's size.
    beside = shutil.copytree(tmp_path / "run" / "pipeline" / "adapter", tmp_path / "beside")
    for number, adapter in enumerate((tmp_path / "run", beside)):
        done(
            "sample",
            f"pipeline={sd3 / 'base'}",
            f"adapter={adapter}",
            "prompts=a red square",
            f"output_dir={tmp_path / f'adapted{number}'}",
            "device=cpu",
        )
        (picture,) = (tmp_path / f"adapted{number}").rglob("0*.png")
        with Image.open(picture) as image:
            assert image.size == (64, 64)
        used = load_config(tmp_path / f"adapted{number}" / "config.yaml", schema=SampleConfig)
        assert used.num_inference_steps == 2


def test_sensitivity_of_stable_diffusion_3(sd3, tmp_path):
    settings = [f"model={sd3 / 'base'}", "mhla.layout=[2,2]", "timesteps=[500]", "device=cpu"]
    done("inspect", "sensitivity", f"output_dir={tmp_path}", "distill_steps=1", *settings)
    found = [json.loads(line) for line in (tmp_path / "layers.jsonl").read_text().splitlines()]
    assert len(found) == 1 + 4 and all(line["output_error"] > 0 for line in found[1:])


def test_settings_that_do_not_fit_are_refused(sd3, tmp_path):
    def refused(*settings):
        common = [
            f"output_dir={tmp_path / 'run'}",
            "data.source=cache",
            f"data.path={sd3 / 'cache'}",
        ]
        return main(["train", *common, *SMALL, *settings])

    assert refused("transformer.name=SD3Transformer2D") != 0
    assert refused("transformer.name=FluxTransformer2DModel", "transformer.sizes.heads=1") != 0
    assert refused(
        f"model.pretrained={sd3 / 'base'}", "transformer.guidance=1", "objective.name=ddpm"
    )
    assert not (tmp_path / "run").exists()


def test_ltx_video_from_clips_to_a_clip(tmp_path):
    ltx_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "videos").mkdir()
    for number in range(2):
        tiny_video(tmp_path / "videos" / f"{number}.mp4", 10, 64, 96)
        (tmp_path / "videos" / f"{number}.txt").write_text("a red square moves right")
    done(
        "cache",
        f"output_dir={tmp_path / 'cache'}",
        "data.source=clips",
        f"data.path={tmp_path / 'videos'}",
        f"vae.path={tmp_path / 'base'}",
        f"text.path={tmp_path / 'base'}",
        "clips.buckets=[[9,64,96]]",
        "num_workers=1",
        "device=cpu",
    )
    done(
        "train",
        f"output_dir={tmp_path / 'run'}",
        "data.source=cache",
        f"data.path={tmp_path / 'cache'}",
        f"model.pretrained={tmp_path / 'base'}",
        "model.mhla.layout=[1,2,2]",
        "transformer.save_text_encoder=true",
        *SMALL,
    )
    names = {path.name for path in (tmp_path / "run" / "previews").iterdir()}
    assert {"clip-0000002-00.mp4", "clip-0000002-01.mp4"} <= names
    done(
        "sample",
        f"pipeline={tmp_path / 'run'}",
        "prompts=a red square",
        f"output_dir={tmp_path / 'samples'}",
        "device=cpu",
    )
    assert list((tmp_path / "samples").rglob("*.mp4"))
