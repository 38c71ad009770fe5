"""Caches of clips: latents and embeddings as Wan's pipeline would make them, bucket by bucket."""

import json

import imageio.v3 as iio
import pytest
import torch
from diffusers import WanPipeline
from tiny import tiny_clip_cache, tiny_dit_pipeline, tiny_video

from mhla_gen.config import DataConfig, load_config
from mhla_gen.data import BatchOrder, batches, load_data
from mhla_gen.data.arrays import to_model_range
from mhla_gen.data.caching.build import build_cache
from mhla_gen.data.caching.cached import CachedLatents


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_clip_cache(tmp_path_factory.mktemp("clips"), "dtype=float32", "text.dtype=float32")


@pytest.fixture(scope="module")
def pipeline(cache):
    return WanPipeline.from_pretrained(cache.parent / "pipeline", transformer_2=None)


def config_of(cache, *overrides):
    return load_config(cache / "config.yaml", list(overrides))


def test_buckets_hold_what_fits_them(cache):
    data = load_data(DataConfig(source="cache", path=str(cache)))
    assert data.buckets == (range(3), range(3, 6), range(6, 7))
    assert data.sample_shapes == ((16, 3, 4, 6), (16, 3, 6, 4), (16, 1, 4, 6))
    assert data.class_names is None
    rows = json.loads((cache / "clips.json").read_text())
    assert {row["name"].rsplit("/", 1)[1]: row["bucket"] for row in rows} == {
        **{f"wide{k}.mp4": 0 for k in range(3)},
        **{f"tall{k}.mp4": 1 for k in range(3)},
        "short.mp4": 2,
    }


def test_latents_are_those_of_the_clip(cache, pipeline):
    data = CachedLatents.open(cache)
    batch = data.read([0])
    # 12 frames at the rate of the bucket: 9 from the middle.
    frames = iio.imread(cache.parent / "videos" / "wide0.mp4", plugin="FFMPEG")[2:11]
    assert data.describe(0).endswith("wide0.mp4 frames 2…10")
    with torch.inference_mode():
        found = pipeline.vae.encode(to_model_range(frames[None])).latent_dist
    mean, std = (
        torch.tensor(pipeline.vae.config[name]).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    torch.testing.assert_close(batch["mean"], (found.mean - mean) / std)
    torch.testing.assert_close(batch["std"], found.std / std)


def test_embeddings_are_those_of_the_pipeline(cache, pipeline):
    data = CachedLatents.open(cache)
    for index in (0, 1, 6):
        expected, empty = pipeline.encode_prompt(data.caption(index), "", max_sequence_length=9)
        found = data.read([index])["prompt_embeds"]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(data.empty_prompt_embeds, empty[0])
    assert data.caption(0) == "a red square moves left" and data.caption(6) == "a square"
    assert found.shape == (1, 9, 16) and not torch.equal(found[0], data.empty_prompt_embeds)


def test_training_reads_every_bucket(cache):
    data = load_data(DataConfig(source="cache", path=str(cache)))
    order = BatchOrder(data.buckets, 2, seed=0)
    shapes = {tuple(batch["mean"].shape) for step in batches(data, order, 0, 12) for batch in step}
    assert shapes == {(2, *shape) for shape in data.sample_shapes}


def test_a_finished_cache_is_found_again(cache):
    before = {p: p.stat().st_mtime_ns for p in cache.glob("*.safetensors")}
    assert "7 samples" in build_cache(config_of(cache))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    with pytest.raises(FileExistsError, match=r"clips\.max_windows: found 1, asked for 2"):
        build_cache(config_of(cache, "clips.max_windows=2"))
    text = cache.parent / "videos" / "wide0.txt"
    caption = text.read_text()
    text.write_text("another caption")
    with pytest.raises(FileExistsError, match=r"data\.captions: found"):
        build_cache(config_of(cache))
    text.write_text(caption)


def test_broken_clips_are_listed_and_left_out(cache, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    tiny_video(videos / "good.mp4")
    content = bytearray((videos / "good.mp4").read_bytes())
    # The first frame can be decoded, later ones cannot.
    tiny_video(videos / "holed.mp4", frames=60)
    content = bytearray((videos / "holed.mp4").read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    (videos / "holed.mp4").write_bytes(content)
    (videos / "junk.mp4").write_bytes(b"junk")
    tiny_video(videos / "tiny.mp4", height=16, width=24)
    config = config_of(
        cache,
        f"data.path={videos}",
        f"output_dir={tmp_path / 'cache'}",
        "clips.missing_caption=empty",
        "text.path=null",
        "chunk_size=1",
    )
    line = build_cache(config)
    assert line.count("1 of [16, 3, 4, 6]") == 1 and "2 could not be read" in line
    table = capsys.readouterr().out
    assert "tiny.mp4 is 16 × 24 pixels, smaller than every bucket" in table
    lines = [json.loads(line) for line in (tmp_path / "cache/quarantine.jsonl").open()]
    assert sorted(row["name"].rsplit("/")[-1].split()[0] for row in lines) == [
        "holed.mp4",
        "junk.mp4",
    ]
    data = CachedLatents.open(tmp_path / "cache")
    assert len(data) == 1 and data.describe(0).startswith(str(videos / "good.mp4"))
    with pytest.raises(ValueError, match="no embedded captions"):
        _ = data.empty_prompt_embeds


def test_what_does_not_fit_together_is_refused(cache, tmp_path):
    out = f"output_dir={tmp_path / 'cache'}"
    with pytest.raises(ValueError, match="1 \\+ a multiple of 4 frames, found 8"):
        build_cache(config_of(cache, out, "clips.buckets=[[8, 32, 48]]"))
    with pytest.raises(ValueError, match="no clip fits any bucket"):
        build_cache(config_of(cache, out, "clips.buckets=[[81, 32, 48]]"))
    tiny_dit_pipeline().save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match="has no text_encoder and tokenizer"):
        build_cache(config_of(cache, out, f"text.path={tmp_path / 'dit'}"))
    with pytest.raises(ValueError, match="AutoencoderKL encodes images"):
        build_cache(config_of(cache, out, f"vae.path={tmp_path / 'dit'}"))
    with pytest.raises(ValueError, match="must be a pipeline"):
        build_cache(config_of(cache, out, f"text.path={tmp_path / 'dit' / 'vae'}"))
