"""Image to video as in Wan 2.1: the first frame also reaches the model through CLIP."""

import json
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import save_file
from test_video import SMALL, first_frame, losses_of, wan_run
from tiny import disturb, tiny_clip_cache, tiny_image_encoder, tiny_wan, tiny_wan_image_pipeline
from tiny_sampling import set_of

import mhla_gen
from mhla_gen.config import ImageEncoderConfig, MHLAConfig, load_config
from mhla_gen.config.previews import PreviewConfig
from mhla_gen.data import load_data
from mhla_gen.data.caching.build import build_cache
from mhla_gen.sampling import sample
from mhla_gen.sampling.building import build_sampler
from mhla_gen.sampling.saved_pipeline import load_pipeline
from mhla_gen.training import rehearse, train
from mhla_gen.training.build import build_task

CONDITION = ("clips.condition=true", "text.max_sequence_length=512", "dtype=float32")
FIRST_FRAME = {"first_frame": True}
NONE = ImageEncoderConfig()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return tiny_clip_cache(folder, *CONDITION, clips=1, pipeline=tiny_wan_image_pipeline())


@pytest.fixture(scope="module")
def pipeline(cache):
    return WanImageToVideoPipeline.from_pretrained(cache.parent / "pipeline", transformer_2=None)


def image_run(folder, cache, **changes):
    model = {"pretrained": str(cache.parent / "pipeline")}
    return wan_run(folder, cache, FIRST_FRAME, model, **changes)


def clip_of(data):
    """The first sample with several frames."""
    return next(i for i in range(len(data)) if data.read([i])["mean"].shape[2] > 1)


def test_cached_embeddings_are_those_of_the_pipeline(cache, pipeline):
    data = load_data(wan_run(cache, cache).data)
    for index in range(len(data)):
        height, width = (8 * n for n in data.read([index])["mean"].shape[3:])
        frame = first_frame(cache, data.describe(index), height, width)
        expected = pipeline.encode_image(frame, torch.device("cpu"))
        found = data.read([index])["image_embeds"]
        assert found.shape == (1, 5, 20)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    first, second = (data.read([i])["image_embeds"] for i in (0, 1))
    assert not first.equal(second)


def test_a_training_step_calls_the_model_as_the_pipeline_does(cache, tmp_path):
    config = image_run(tmp_path / "run", cache)
    data = load_data(config.data)
    task = build_task(config, data)
    disturb(task.model.eval())
    item = clip_of(data)
    batch, calls = data.read([item]), []
    task.model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    noisy = torch.randn_like(batch["mean"])
    pipeline = task.pipeline(task.model)
    height, width = (8 * n for n in noisy.shape[3:])
    pipeline(
        image=first_frame(cache, data.describe(item), height, width),
        height=height, width=width, num_frames=9,
        num_inference_steps=1, guidance_scale=3.0, latents=noisy,
        prompt_embeds=batch["prompt_embeds"], negative_prompt_embeds=data.empty_prompt_embeds[None],
        output_type="latent",
    )  # fmt: skip
    with_caption, without = (kwargs for _, kwargs in calls)
    # Guidance leaves out the caption alone, and so does training.
    for theirs, dropped in ((with_caption, False), (without, True)):
        calls.clear()
        times = theirs["timestep"].float()
        found = task.conditioning.predict(task.model, noisy, times, batch, torch.tensor([dropped]))
        (ours,), kwargs = calls[0]
        torch.testing.assert_close(ours, theirs["hidden_states"], rtol=1e-5, atol=1e-5)
        for name in ("encoder_hidden_states", "encoder_hidden_states_image", "timestep"):
            assert kwargs[name].float().equal(theirs[name].float()), name
        calls.clear()
        expected = task.model(**theirs)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert with_caption["encoder_hidden_states_image"].equal(without["encoder_hidden_states_image"])


def test_a_dry_run_names_the_encoder_of_first_frames(cache, tmp_path):
    config = load_config(cache / "config.yaml", [f"output_dir={tmp_path / 'new'}"])
    assert "first frames by CLIPVisionModel" in build_cache(config, dry_run=True)
    plain = replace(config, clips=replace(config.clips, condition=False), image_encoder=NONE)
    assert "first frames" not in build_cache(plain, dry_run=True)


def test_injection_leaves_attention_to_the_image_alone():
    model = tiny_wan(in_channels=36, image_dim=20, added_kv_proj_dim=24)
    before = [block.attn2.state_dict() for block in model.blocks]
    mhla_gen.inject(model, MHLAConfig(layout=(1, 2, 2)))
    for block, weights in zip(model.blocks, before, strict=True):
        assert type(block.attn2.processor).__name__ == "WanAttnProcessor"
        assert all(block.attn2.state_dict()[n].equal(w) for n, w in weights.items())
    inputs = {
        "hidden_states": torch.randn(1, 36, 3, 4, 6),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "return_dict": False,
    }
    image = torch.randn(1, 5, 20, requires_grad=True)
    model(**inputs, encoder_hidden_states_image=image)[0].square().mean().backward()
    assert image.grad.abs().max() > 0


def test_from_clips_to_mp4(cache, tmp_path):
    samples = PreviewConfig(num_images=1, num_inference_steps=2, guidance_scale=2.0)
    config = image_run(
        tmp_path / "run", cache, max_steps=3, sample_every=3, samples=samples, checkpoint_every=3
    )
    train(config)
    assert len(losses_of(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "previews" / "clip-0000003-00.mp4").is_file()
    saved = load_pipeline(str(tmp_path / "run" / "pipeline"), torch.bfloat16)
    assert type(saved.transformer) is mhla_gen.MHLAWanTransformer3DModel
    assert saved.transformer.dtype is torch.bfloat16
    assert saved.image_encoder.dtype is saved.vae.dtype is torch.float32
    made = []
    for source in (tmp_path / "run" / "pipeline", next((tmp_path / "run").glob("checkpoint-*"))):
        config = sample_of(tmp_path, cache, source)
        sample(config)
        videos = sorted((Path(config.output_dir) / "videos").glob("*.mp4"))
        made.append([iio.imread(path, plugin="FFMPEG") for path in videos])
    assert [clip.shape for clip in made[0]] == [(5, 32, 48, 3)] * 2
    assert not (made[0][0] == made[0][1]).all(), "prompts have first frames of their own"
    assert all((a == b).all() for a, b in zip(*made, strict=True))


def sample_of(folder, cache, source, **changes):
    """Settings of two samples, alike but for their first frames, of a saved pipeline."""
    lines = []
    for name, colour in (("green.png", (20, 120, 30)), ("blue.png", (20, 30, 220))):
        Image.new("RGB", (48, 32), colour).save(folder / name)
        lines.append({"prompt": "a red square", "image": name, "seed": 0})
    prompts, embeds = folder / "prompts.jsonl", folder / "embeds.safetensors"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    empty = load_data(wan_run(cache, cache).data).empty_prompt_embeds[None]
    save_file({"prompt_embeds": empty.repeat(2, 1, 1), "negative_prompt_embeds": empty}, embeds)
    sizes = {"height": 32, "width": 48, "num_frames": 5, "guidance_scale": 2.0, "device": "cpu"}
    texts = {"prompts": str(prompts), "prompt_embeds": str(embeds)}
    return set_of(folder / f"{source.name}-samples", source, **sizes | texts | changes)


def test_a_first_frame_of_another_shape_is_cropped_as_clips_are(cache, tmp_path):
    config = sample_of(tmp_path, cache, cache.parent / "pipeline")
    (_, sampler), given = build_sampler(config), []
    tall = np.zeros((80, 48, 3), np.uint8)
    # What is left of it: the middle 32 of 80 rows.
    tall[24:56] = (200, 30, 30)
    Image.fromarray(tall).save(tmp_path / "green.png")
    sampler.pipeline.encode_image = lambda image, device: (
        given.append(image) or torch.zeros(1, 5, 20)
    )
    sampler.draw([0], steps=1)
    assert given[0].size == (48, 32) and (np.asarray(given[0]) == (200, 30, 30)).all()


def test_embedded_prompts_of_another_length_are_refused(cache, tmp_path):
    names = ("prompt_embeds", "negative_prompt_embeds")
    save_file({name: torch.zeros(2, 9, 16) for name in names}, tmp_path / "short")
    config = sample_of(
        tmp_path, cache, cache.parent / "pipeline", prompt_embeds=str(tmp_path / "short")
    )
    with pytest.raises(ValueError, match="prompt_embeds of 512 tokens, found 9"):
        sample(config)


def test_what_a_cache_lacks_is_said_with_how_to_rebuild_it(cache, tmp_path):
    plain = tiny_clip_cache(tmp_path, *CONDITION, clips=1)
    model = {"pretrained": str(cache.parent / "pipeline" / "transformer")}
    with pytest.raises(ValueError, match=r"build the cache again.*image_encoder\.path=PIPELINE"):
        rehearse(wan_run(tmp_path / "run", plain, FIRST_FRAME, model))
    short = tmp_path / "short"
    overrides = (*CONDITION, "text.max_sequence_length=9")
    short = tiny_clip_cache(short, *overrides, clips=1, pipeline=tiny_wan_image_pipeline())
    with pytest.raises(ValueError, match=r"text\.max_sequence_length=512"):
        rehearse(wan_run(tmp_path / "run", short, FIRST_FRAME, model))
    with pytest.raises(ValueError, match="must be a pipeline with the folders image_encoder"):
        tiny_clip_cache(
            tmp_path / "none", *CONDITION, f"image_encoder.path={tmp_path / 'pipeline'}"
        )


def test_another_image_encoder_is_refused(cache, tmp_path):
    other = tiny_wan_image_pipeline()
    other.vae = load_data(wan_run(cache, cache).data).autoencoder()
    other.image_encoder = tiny_image_encoder()[1]
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(FileExistsError, match=r"image_encoder\.weights"):
        path = f"image_encoder.path={tmp_path / 'other'}"
        build_cache(load_config(cache / "config.yaml", [path]))
    model = {"pretrained": str(tmp_path / "other")}
    with pytest.raises(ValueError, match=r"first frames .* made by a different image encoder"):
        rehearse(wan_run(tmp_path / "run", cache, FIRST_FRAME, model))


def test_a_new_model_reads_embeddings_where_the_cache_has_them(cache, tmp_path):
    config = wan_run(tmp_path / "run", cache, FIRST_FRAME)
    model = build_task(config, load_data(config.data)).model
    assert model.config.image_dim == 20 and model.config.in_channels == 36
    assert model.config.added_kv_proj_dim == (
        SMALL["num_attention_heads"] * SMALL["attention_head_dim"]
    )


def test_experts_without_a_pipeline_meet_where_those_of_wan_do(cache, tmp_path):
    data = load_data(wan_run(cache, cache).data)
    for given, boundary in ((False, 0.875), (True, 0.9)):
        wan = {"first_frame": given, "expert": "high_noise"}
        objective = build_task(wan_run(tmp_path / "run", cache, wan), data).objective
        assert (objective.lowest, objective.highest) == (boundary, 1.0)


@pytest.fixture
def fresh_state():
    """Accelerate keeps the arithmetic of the first run in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_state")
@pytest.mark.parametrize("experts", [False, True])
def test_on_a_gpu_from_clips_to_mp4(tmp_path, experts):
    sizes = {"attention_head_dim": 16, "in_channels": 36}
    model = tiny_wan(**sizes, **({} if experts else {"image_dim": 20, "added_kv_proj_dim": 32}))
    pipeline = tiny_wan_image_pipeline(model)
    if experts:
        # Wan 2.2: two models, and no encoder of images.
        parts = pipeline.components | {"image_encoder": None, "image_processor": None}
        parts["transformer_2"] = tiny_wan(**sizes)
        pipeline = WanImageToVideoPipeline(**parts, boundary_ratio=0.5)
    cache = tiny_clip_cache(tmp_path, *CONDITION, "device=cuda", clips=1, pipeline=pipeline)
    samples = PreviewConfig(num_images=1, num_inference_steps=4, guidance_scale=2.0)
    changes = {"sample_every": 2, "samples": samples, "mixed_precision": "bf16"}
    for expert in ("high_noise", "low_noise") if experts else (None,):
        folder = tmp_path / f"run-{expert}"
        wan = FIRST_FRAME | {"expert": expert}
        config = wan_run(folder, cache, wan, {"pretrained": str(tmp_path / "pipeline")}, **changes)
        train(config)
        assert (folder / "previews" / "clip-0000002-00.mp4").is_file()
        for offload in ("none", "model"):
            made = sample_of(
                tmp_path, cache, folder, offload=offload, device="cuda", dtype="bfloat16"
            )
            made = replace(made, output_dir=str(tmp_path / f"{expert}-{offload}"))
            sample(made)
            videos = Path(made.output_dir) / "videos"
            assert iio.imread(videos / "000000.mp4", plugin="FFMPEG").shape == (5, 32, 48, 3)
