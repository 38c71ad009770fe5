"""Training of Wan on clips with captions: what the model is given, and the whole way to mp4."""

import copy
import json
from dataclasses import replace

import imageio.v3 as iio
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from tiny import disturb, tiny_clip_cache, tiny_wan, tiny_wan_pipeline, wan_inputs

import mhla_gen
from mhla_gen.config import (
    DataConfig,
    DistillConfig,
    MHLAConfig,
    ModelConfig,
    StageConfig,
    TrainConfig,
    WanConfig,
)
from mhla_gen.config.previews import PreviewConfig
from mhla_gen.data import load_data
from mhla_gen.data.buckets import Bucket, crop_for
from mhla_gen.data.clips import read_placements
from mhla_gen.distillation import distill
from mhla_gen.media import Decoder
from mhla_gen.models import MHLA
from mhla_gen.sampling.saved_pipeline import load_pipeline
from mhla_gen.training import rehearse, train
from mhla_gen.training.build import build_task
from mhla_gen.training.clip_objectives import ClipMatching
from mhla_gen.training.objectives import FlowMatching
from mhla_gen.training.training_run import build_run
from mhla_gen.training.wan_captions import CaptionAttnProcessor
from mhla_gen.training.wan_conditions import WanConditions, first_frame_mask, token_times

SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_clip_cache(tmp_path_factory.mktemp("clips"))


def wan_run(folder, cache, wan=None, model=None, **changes):
    settings = {
        "output_dir": str(folder),
        "data": DataConfig(source="cache", path=str(cache)),
        "model": ModelConfig(**{"mhla": MHLAConfig(layout=(2, 2, 2))} | (model or {})),
        "wan": WanConfig(**SMALL | (wan or {})),
        "max_steps": 2,
        "batch_size": 2,
        "warmup_steps": 0,
        "mixed_precision": "fp32",
        "checkpoint_every": 0,
        "sample_every": 0,
        "log_every": 1,
        "report_to": "none",
    }
    return TrainConfig(**settings | changes)


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_new_wan_learns_from_a_cache_of_clips(cache, tmp_path):
    samples = PreviewConfig(num_images=2, num_inference_steps=2, guidance_scale=2.0)
    model = {"mhla": MHLAConfig(layout=(2, 2, 2), exact=0.3, exact_top=1)}
    config = wan_run(tmp_path / "run", cache, model=model, sample_every=2, samples=samples)
    assert "clips, latents 16 ×" in rehearse(config) and not (tmp_path / "run").exists()
    train(config)
    pipeline = WanPipeline.from_pretrained(
        tmp_path / "run" / "pipeline", tokenizer=None, text_encoder=None, transformer_2=None
    )
    assert type(pipeline.transformer) is mhla_gen.MHLAWanTransformer3DModel
    assert pipeline.transformer.mhla_config.exact_start == 0.5
    names = {path.name for path in (tmp_path / "run" / "previews").iterdir()}
    assert {"clip-0000002-00.mp4", "clip-0000002-01.mp4", "samples-0000002.png"} <= names
    assert preview_fps(tmp_path / "run") == 16


def preview_fps(folder):
    return iio.immeta(folder / "previews" / "clip-0000002-00.mp4", plugin="FFMPEG")["fps"]


def test_two_shapes_meet_in_one_step_and_a_killed_run_goes_on_exactly(cache, tmp_path):
    changes = {"gradient_accumulation_steps": 2, "batch_size": 4, "max_steps": 4}
    config = wan_run(tmp_path / "whole", cache, gradient_checkpointing=True, **changes)
    data = load_data(config.data)
    assert {shape[1:] for shape in data.sample_shapes} == {(3, 4, 6), (3, 6, 4), (1, 4, 6)}
    steps = build_run(config).batches(0, 4)
    shapes = [{tuple(part["mean"].shape[2:]) for part in parts} for parts in steps]
    assert any(len(found) == 2 for found in shapes)
    train(config)
    half = replace(config, output_dir=str(tmp_path / "half"), max_steps=2, checkpoint_every=2)
    train(half)
    train(replace(half, max_steps=4, resume="latest"))
    assert losses_of(tmp_path / "half") == losses_of(tmp_path / "whole")


def test_low_rank_updates_and_mhla_learn_and_nothing_else(cache, tmp_path):
    source = tmp_path / "base"
    tiny_wan().save_pretrained(source)
    model = {"pretrained": str(source), "trainable": "lora"}
    config = wan_run(tmp_path / "run", cache, {"lora_rank": 2}, model, learning_rate=1e-2)
    config = replace(config, ema_decay=0.0, checkpoint_every=config.max_steps)
    task = build_task(config, load_data(config.data))
    assert all(type(b.attn2.processor) is CaptionAttnProcessor for b in task.model.blocks)
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name or ".mhla." in name for name in trained)
    train(config)
    before = dict(tiny_wan().from_pretrained(source).named_parameters())
    found = mhla_gen.MHLAWanTransformer3DModel.from_pretrained(
        tmp_path / "run" / "pipeline" / "transformer"
    )
    moved = {n for n, p in found.named_parameters() if n in before and not p.equal(before[n])}
    assert {name.rsplit(".", 2)[-2] for name in moved} == {"to_q", "to_k", "to_v", "0", "proj", "2"}
    assert not any("norm" in name or "embed" in name for name in moved)
    # What was learned is also saved alone, and the pipeline is the base with it.
    adapted = mhla_gen.load_adapter(tiny_wan().from_pretrained(source), tmp_path / "run")
    inputs = wan_inputs()
    with torch.no_grad():
        samples = [model.eval()(**inputs).sample for model in (adapted, found)]
    torch.testing.assert_close(*samples, rtol=1e-3, atol=1e-4)
    # A checkpoint gives the same pipeline, without adapters.
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    state = load_pipeline(str(checkpoint), torch.float32).transformer.state_dict()
    assert state.keys() == found.state_dict().keys()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(state[name], value)


def test_an_expert_learns_its_noise_levels_and_is_saved_with_the_other(cache, tmp_path):
    pair = tiny_wan_pipeline(two_experts=True)
    pair.register_modules(vae=load_data(DataConfig(source="cache", path=str(cache))).autoencoder())
    pair.save_pretrained(tmp_path / "pair")
    model = {"pretrained": str(tmp_path / "pair")}
    samples = PreviewConfig(num_images=1, num_inference_steps=4)
    previews = {"sample_every": 2, "samples": samples}
    config = wan_run(tmp_path / "run", cache, {"expert": "low_noise"}, model, **previews)
    task = build_task(config, load_data(config.data))
    times = task.objective.draw_times(1000, torch.Generator().manual_seed(0))
    assert times.max() <= 0.5 and times.max() > 0.48
    train(config)
    absent = {"tokenizer": None, "text_encoder": None}
    pair = WanPipeline.from_pretrained(tmp_path / "run" / "pipeline", **absent)
    assert (tmp_path / "run" / "previews" / "clip-0000002-00.mp4").is_file()
    assert type(pair.transformer) is type(tiny_wan()) and pair.config.boundary_ratio == 0.5
    assert type(pair.transformer_2) is mhla_gen.MHLAWanTransformer3DModel


def test_noise_levels_of_an_expert_are_those_of_all_cut_at_the_boundary():
    whole = FlowMatching(0.3, 0.9, 3.0)
    times = whole.draw_times(200_000, torch.Generator().manual_seed(0))
    for low, high in ((0.0, 0.875), (0.875, 1.0)):
        part = ClipMatching(0.3, 0.9, 3.0, lowest=low, highest=high)
        found = part.draw_times(100_000, torch.Generator().manual_seed(1))
        assert low <= found.min() and found.max() <= high
        kept = times[(times >= low) & (times < high)]
        at = torch.linspace(0.05, 0.95, 10)
        torch.testing.assert_close(found.quantile(at), kept.quantile(at), rtol=0, atol=4e-3)


def test_tokens_of_a_known_first_frame_have_time_zero():
    times = token_times(torch.tensor([500.0, 20.0]), (3, 4, 6), (1, 2, 2), True)
    assert times.shape == (2, 18) and times[:, :6].eq(0).all()
    assert times[0, 6:].eq(500).all() and times[1, 6:].eq(20).all()
    assert first_frame_mask(torch.rand(2, 16, 3, 4, 6))[:, :, 0].eq(1).all()


@pytest.mark.parametrize("by_token", [True, False])
def test_image_to_video_gives_the_model_what_the_pipeline_gives_it(tmp_path, by_token):
    # 12 frames at 16 a second are 9 at 12.
    cache = tiny_clip_cache(tmp_path, "clips.condition=true", "clips.fps=12", clips=1)
    wan = {"first_frame": True, "times_of_tokens": by_token}
    samples = PreviewConfig(num_images=1, num_inference_steps=2)
    config = wan_run(tmp_path / "run", cache, wan, sample_every=2, samples=samples)
    data = load_data(config.data)
    task = build_task(config, data)
    item = next(i for i in range(len(data)) if data.read([i])["mean"].shape[2] > 1)
    batch, calls = data.read([item]), []

    def record(model):
        model.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        return model

    noisy = torch.randn_like(batch["mean"])
    dropped, time = torch.tensor([False]), torch.tensor([500.0])
    task.conditioning.predict(record(task.model), noisy, time, batch, dropped)
    given, ours = calls[0][0][0], calls[0][1]

    pipeline = task.pipeline(task.model.eval())
    assert type(pipeline) is WanImageToVideoPipeline
    height, width = (8 * n for n in noisy.shape[3:])
    frame = first_frame(cache, data.describe(item), height, width)
    calls.clear()
    pipeline(
        image=frame, height=height, width=width, num_frames=9,
        num_inference_steps=1, guidance_scale=1.0, latents=noisy,
        prompt_embeds=batch["prompt_embeds"].float(), output_type="latent",
    )  # fmt: skip
    theirs = calls[0][1]
    torch.testing.assert_close(theirs["hidden_states"], given, rtol=0, atol=2e-2)
    assert theirs["timestep"].shape == ours["timestep"].shape
    assert theirs["timestep"].eq(0).equal(ours["timestep"].eq(0))
    train(config)
    assert preview_fps(tmp_path / "run") == 12


def first_frame(cache, name, height, width):
    """As the cache was made of it."""
    path = name.split(" frames")[0]
    placement = next(p for p in read_placements(cache / "clips.json") if p.name == path)
    crop = crop_for(Bucket(9, height, width), placement.height, placement.width)
    with Decoder(60, 1) as decoder:
        return Image.fromarray(decoder.frames(path, placement.windows[0][:1], crop)[0])


def test_dropped_captions_become_the_empty_one():
    seen = []

    def model(noisy, *, timestep, encoder_hidden_states, return_dict):
        seen.append(encoder_hidden_states)
        return (noisy,)

    empty, batch = torch.zeros(4, 8), {"prompt_embeds": torch.rand(2, 4, 8)}
    prompts = WanConditions(empty, (1, 2, 2))
    noisy, dropped = torch.rand(2, 16, 1, 4, 4), torch.tensor([True, False])
    prompts.predict(model, noisy, torch.rand(2), batch, dropped)
    assert seen[0][0].equal(empty) and seen[0][1].equal(batch["prompt_embeds"][1])


def test_what_does_not_fit_is_said_before_anything_is_written(cache, tmp_path):
    def refused(message, **settings):
        with pytest.raises(ValueError, match=message):
            rehearse(wan_run(tmp_path / "run", cache, **settings))
        assert not (tmp_path / "run").exists()

    refused("clips.condition=true", wan={"first_frame": True})
    refused("source=cache", data=DataConfig())
    tiny_wan(text_dim=24).save_pretrained(tmp_path / "other")
    refused("text_dim is 24, but the data need 16", model={"pretrained": str(tmp_path / "other")})
    with pytest.raises(ValueError, match="needs wan"):
        TrainConfig(model=ModelConfig(trainable="lora"))
    with pytest.raises(ValueError, match=r"wan\.attention_head_dim must be even"):
        WanConfig(attention_head_dim=7)
    with pytest.raises(ValueError, match=r"boundary needs wan\.expert"):
        WanConfig(boundary=0.9)


def test_a_distillation_runs_its_stages_on_clips(cache, tmp_path):
    tiny_wan().save_pretrained(tmp_path / "teacher")
    stages = [StageConfig(kind="layers", steps=2), StageConfig(kind="output", steps=2)]
    distillation = DistillConfig(teacher=str(tmp_path / "teacher"), stages=stages)
    config = wan_run(tmp_path / "run", cache, distill=distillation)
    folder = distill(config)
    found = mhla_gen.MHLAWanTransformer3DModel.from_pretrained(folder / "transformer")
    assert {row.kind for row in mhla_gen.summary(found)} == {"mhla"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [(21, 60, 104), (21, 104, 60), (2, 60, 104), (1, 60, 104)])
def test_one_set_of_weights_takes_every_size_as_the_definition_says(size):
    # Latents of 81, 5 and 1 frames at 480 × 832 and upright: 52 or 30 columns into 9 blocks.
    torch.manual_seed(0)
    model = disturb(mhla_gen.inject(tiny_wan(num_layers=2, rope_max_seq_len=128)))
    exact = copy.deepcopy(model).double()
    for layer in exact.modules():
        if isinstance(layer, MHLA):
            layer.config = replace(layer.config, implementation="naive")
    inputs = wan_inputs(*size)
    found = model(**inputs).sample
    expected = exact(**{name: x.double() for name, x in inputs.items()}).sample
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    found.square().mean().backward()
    expected.square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        if theirs.grad is not None:
            scale = theirs.grad.abs().max().clamp(min=1e-6)
            gradients = ours.grad / scale, (theirs.grad / scale).float()
            torch.testing.assert_close(*gradients, rtol=0, atol=2e-3, msg=lambda m, n=name: n + m)
