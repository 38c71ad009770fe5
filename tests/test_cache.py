"""Caches of latents: the right numbers, whole files, any number of processes, no silent change."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from commands import finish, launch
from PIL import Image
from tiny import tiny_autoencoder, tiny_dit_pipeline, tiny_wan_autoencoder, tiny_wan_pipeline
from tiny_autoencoders import autoencoder_of_ltx

from mhla_gen.cli import main
from mhla_gen.config import (
    AutoencoderConfig,
    CacheConfig,
    DataConfig,
    ModelConfig,
    TrainConfig,
    load_config,
    save_config,
)
from mhla_gen.data import load_data
from mhla_gen.data.arrays import to_model_range
from mhla_gen.data.autoencoder import encode, latent_normalisation, latent_shape, load_autoencoder
from mhla_gen.data.caching.build import build_cache
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.training import rehearse, train
from mhla_gen.training.build import build_task
from mhla_gen.training.pretrained import require_pipeline

COUNT = 22


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Images of two classes, one of which cannot be read, and an autoencoder."""
    root = tmp_path_factory.mktemp("source")
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    for name in ("ant", "bee"):
        (root / "images" / name).mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(root / "images" / ("ant", "bee")[i % 2] / f"{i:02d}.png")
    (root / "images" / "ant" / "06.png").write_bytes(b"junk")
    torch.manual_seed(0)
    tiny_autoencoder().save_pretrained(root / "vae")
    return root


def config_for(source, output, *overrides):
    values = [
        f"output_dir={output}",
        "data.source=folder",
        f"data.path={source / 'images'}",
        "data.image_size=16",
        "data.horizontal_flip=true",
        f"vae.path={source / 'vae'}",
        "chunk_size=5",
        "batch_size=2",
        "num_workers=2",
        "dtype=float32",
        "device=cpu",
    ]
    return load_config(None, [*values, *overrides], CacheConfig)


@pytest.fixture(scope="module")
def cache(source):
    build_cache(config_for(source, source / "cache"))
    return source / "cache"


def content(folder):
    """Bytes of all files that do not hold paths of the run."""
    names = [p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".jsonl")]
    assert not list(folder.glob(".*"))
    return {name: (folder / name).read_bytes() for name in sorted([*names, "settings.json"])}


def test_latents_are_the_posterior_of_both_sides(source, cache):
    data = CachedLatents.open(cache)
    vae = diffusers.AutoencoderKL.from_pretrained(source / "vae")
    images = sorted((source / "images").glob("*/*.png"))
    images = [path for path in images if path.name != "06.png"]
    assert len(data) == COUNT - 1 and data.class_names == ("ant", "bee")
    assert data.sample_shapes == ((4, 2, 2),) and data.buckets == (range(COUNT - 1),)
    batch = data.read(range(len(data)))
    assert batch["labels"].tolist() == [int(path.parent.name == "bee") for path in images]
    for i, path in enumerate(images):
        assert data.describe(i) == str(path)
        pixels = to_model_range(np.array(Image.open(path))[None])
        for suffix, side in (("", pixels), ("_flipped", pixels.flip(-1))):
            with torch.inference_mode():
                found = vae.encode(side).latent_dist
            scale = vae.config.scaling_factor
            torch.testing.assert_close(batch[f"mean{suffix}"][i], (found.mean * scale)[0])
            torch.testing.assert_close(batch[f"std{suffix}"][i], (found.std * scale)[0])
    shuffled = data.read([20, 3, 11])
    assert all(torch.equal(shuffled[name], batch[name][[20, 3, 11]]) for name in batch)


def test_an_unreadable_image_is_listed_and_left_out(source, cache, tmp_path):
    (line,) = (cache / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["name"].endswith("ant/06.png")
    assert "cannot be decoded" in json.loads(line)["reason"]
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.png").write_bytes(b"junk")
    config = config_for(source, tmp_path / "cache", f"data.path={tmp_path / 'images'}")
    with pytest.raises(
        ValueError, match=r"none of 1 files could be read; .*0\.png cannot be decoded"
    ):
        build_cache(config)


def test_a_class_of_which_nothing_is_left_is_said(source, tmp_path, capsys):
    for name in ("ant", "bee", "cat"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            shutil.copy(source / "images" / "bee" / "01.png", tmp_path / f"images/{name}/{i}.png")
    (tmp_path / "images" / "ant" / "1.png").write_bytes(b"junk")
    for path in (tmp_path / "images" / "bee").iterdir():
        path.write_bytes(b"junk")
    config = config_for(source, tmp_path / "cache", f"data.path={tmp_path / 'images'}")
    said = build_cache(config)
    assert "4 could not be read" in said and "no image is left of 1 of 3 classes (bee)" in said
    assert said == build_cache(config)
    run = TrainConfig(
        output_dir=str(tmp_path / "run"),
        data=DataConfig(source="cache", path=str(tmp_path / "cache")),
        model=ModelConfig(num_layers=1, num_attention_heads=1, attention_head_dim=8, patch_size=1),
        max_steps=1,
        batch_size=2,
        mixed_precision="fp32",
        report_to="none",
    )
    assert "no image is left of 1 of 3 classes (bee)" in rehearse(run)
    train(run)
    assert capsys.readouterr().err.count("1 of 3 classes (bee)") == 1


def test_latents_beyond_the_dtype_are_listed_and_left_out(source, cache, tmp_path):
    latents = load_data(DataConfig(source="cache", path=str(cache)))
    rows = latents.read(range(len(latents)))
    largest = torch.stack(
        [
            rows[f"{name}{side}"].abs().flatten(1).amax(1)
            for name in ("mean", "std")
            for side in ("", "_flipped")
        ]
    ).amax(0)
    second, first = largest.sort().values[-2:].tolist()
    vae = diffusers.AutoencoderKL.from_pretrained(source / "vae")
    # The image with the largest latent overflows float16, all others fit.
    factor = torch.finfo(torch.float16).max / (first + second) * 2
    vae.register_to_config(scaling_factor=vae.config.scaling_factor * factor)
    vae.save_pretrained(tmp_path / "vae")
    overrides = ("dtype=float16", f"vae.path={tmp_path / 'vae'}")
    build_cache(config_for(source, tmp_path / "cache", *overrides))
    listed = [json.loads(line) for line in (tmp_path / "cache" / "quarantine.jsonl").open()]
    named = {line["name"]: line["reason"] for line in listed}
    expected = latents.describe(int(largest.argmax()))
    assert named.keys() == {expected, next(name for name in named if name.endswith("06.png"))}
    assert named[expected] == "has latents that are not finite in float16"
    kept = load_data(DataConfig(source="cache", path=str(tmp_path / "cache")))
    assert len(kept) == len(latents) - 1
    assert expected not in [kept.describe(i) for i in range(len(kept))]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_are_rounded_once(source, cache, tmp_path, dtype):
    build_cache(config_for(source, tmp_path / "cache", f"dtype={dtype}"))
    exact, rounded = CachedLatents.open(cache), CachedLatents.open(tmp_path / "cache")
    for name, tensor in exact.read(range(9)).items():
        if name == "labels":
            continue
        expected = tensor.to(getattr(torch, dtype)).float()
        assert torch.equal(rounded.read(range(9))[name], expected)


# The second file of latents that has its name is the last thing that it does.
KILLED = """
import os, signal, sys
from mhla_gen.cli import main

replace, named = os.replace, []

def counted(source, target):
    replace(source, target)
    named.extend([target] if os.path.basename(target).startswith("latents-") else [])
    if len(named) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = counted
main(["cache", sys.argv[1]])
"""


def test_an_interrupted_run_goes_on_and_ends_as_a_straight_one(source, cache, tmp_path):
    config = config_for(source, tmp_path / "cache")
    save_config(config, tmp_path / "cache.yaml")
    # Convolutions add as threads are dealt.
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cache.yaml")]
    done = subprocess.run(command, env=threads, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("latents-*")}
    assert len(before) == 2
    with pytest.raises(FileNotFoundError, match="an unfinished cache"):
        CachedLatents.open(tmp_path / "cache")
    build_cache(config)
    assert all(p.stat().st_mtime_ns == time_ns for p, time_ns in before.items())
    build_cache(straight := config_for(source, tmp_path / "straight"))
    assert content(tmp_path / "cache") == content(tmp_path / "straight")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "straight").glob("latents-*")}
    build_cache(straight)
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_a_full_disk_leaves_whole_files(source, tmp_path):
    config = config_for(source, tmp_path / "cache", "chunk_size=30")
    # The file of latents has more bytes (7352) than a process may write into one file, settings
    # fewer, however long the names of folders are.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(OSError, match=r"latents-000000\.safetensors cannot be written"):
            build_cache(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [
        "config.yaml",
        "errors.log",
        "settings.json",
    ]
    assert "21 samples" in build_cache(config)


@pytest.mark.slow
def test_two_processes_write_the_same_files(source, cache, tmp_path):
    save_config(config_for(source, tmp_path / "cache"), tmp_path / "cache.yaml")
    # The launcher would give each process one thread, and convolutions add as threads are dealt.
    threads = torch.get_num_threads()
    command = launch("cache", tmp_path / "cache.yaml", processes=2, threads=threads)
    printed, _ = finish(command)
    assert printed.count("21 samples") == 1 and "1 could not be read" in printed
    found, expected = CachedLatents.open(tmp_path / "cache"), CachedLatents.open(cache)
    assert found.index.files == expected.index.files
    for name, tensor in expected.read(range(21)).items():
        torch.testing.assert_close(found.read(range(21))[name], tensor, rtol=1e-5, atol=1e-6)
    assert [found.describe(i) for i in range(21)] == [expected.describe(i) for i in range(21)]


def test_other_settings_are_refused_by_name(source, cache, tmp_path):
    with pytest.raises(FileExistsError, match="dtype: found float32, asked for float16"):
        build_cache(config_for(source, cache, "dtype=float16"))
    diffusers.AutoencoderKL.from_config(
        diffusers.AutoencoderKL.load_config(source / "vae"), scaling_factor=0.5
    ).save_pretrained(tmp_path / "vae")
    with pytest.raises(FileExistsError, match=r"vae\.config: found .*normalisation\.std"):
        build_cache(config_for(source, cache, f"vae.path={tmp_path / 'vae'}"))
    (tmp_path / "other").mkdir()
    for name in ("ant", "bee"):
        (tmp_path / "other" / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / "other" / name / "0.png")
    with pytest.raises(FileExistsError, match=r"data\.files: found 22, asked for 2"):
        build_cache(config_for(source, cache, f"data.path={tmp_path / 'other'}"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="did not write"):
        build_cache(config_for(source, tmp_path / "full"))


def test_captions_and_labels_of_images_are_kept(source, tmp_path):
    tiny_wan_pipeline(text=True).save_pretrained(tmp_path / "text")
    words = ["a red square", "", "a blue square"]
    paths = sorted((source / "images").glob("bee/*.png"))[:6]
    rows = [
        {"path": str(path), "label": i % 2, "caption": words[i % 3]} for i, path in enumerate(paths)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    overrides = ["data.source=list", f"data.path={tmp_path / 'a.jsonl'}", "dtype=bfloat16"]
    overrides += [f"text.path={tmp_path / 'text'}", "text.max_sequence_length=5", "chunk_size=2"]
    build_cache(config_for(source, tmp_path / "cache", *overrides))
    data = CachedLatents.open(tmp_path / "cache")
    batch = data.read([4, 0, 3, 5])
    assert batch["labels"].tolist() == [0, 0, 1, 1]
    prompts = batch["prompt_embeds"]
    assert prompts.shape == (4, 5, 16) and torch.equal(prompts[1], prompts[2])
    assert torch.equal(prompts[0], data.empty_prompt_embeds) and data.caption(5) == words[2]
    assert not torch.equal(prompts[1], prompts[3])


def test_what_could_not_be_read_is_tried_again_on_request(source, tmp_path):
    config = config_for(source, tmp_path / "cache", "retry_quarantined=true")
    build_cache(config)
    whole = content(tmp_path / "cache")
    files = sorted((tmp_path / "cache").glob("latents-*"))
    for file in files:
        os.utime(file, (0, 0))
    build_cache(config)
    # The fourth image is the broken one: it is in the first file of five.
    assert [file.stat().st_mtime > 0 for file in files] == [True] + [False] * 4
    assert content(tmp_path / "cache") == whole


def test_moved_images_are_the_same_images(source, cache, tmp_path):
    os.symlink(source / "images", tmp_path / "moved")
    before = content(cache)
    build_cache(config_for(source, cache, f"data.path={tmp_path / 'moved'}"))
    assert content(cache) == before


def test_changed_and_missing_files_are_found_and_mended(source, tmp_path):
    config = config_for(source, tmp_path / "cache")
    build_cache(config)
    whole = content(tmp_path / "cache")
    verify = load_config(None, [f"output_dir={tmp_path / 'cache'}", "verify=true"], CacheConfig)
    assert "5 files" in build_cache(verify)
    file = tmp_path / "cache" / "latents-000002.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    for again in (verify, config):
        with pytest.raises(ValueError, match=r"latents-000002\.safetensors .*has changed"):
            build_cache(again)
    file.write_bytes(changed[:-8])
    with pytest.raises(ValueError, match="is missing or does not have"):
        CachedLatents.open(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"latents-000002\.safetensors .*cannot be read"):
        build_cache(verify)
    file.unlink()
    with pytest.raises(ValueError, match=r"000002\.safetensors is missing; run `mhla"):
        build_cache(verify)
    build_cache(config)
    assert content(tmp_path / "cache") == whole


def test_a_run_says_when_a_cache_is_not_what_its_config_describes(source, cache, tmp_path):
    def config(**values):
        return DataConfig(source="cache", path=str(cache), **values)

    assert len(load_data(config(image_size=16, num_classes=2, horizontal_flip=True))) == COUNT - 1
    with pytest.raises(ValueError, match=r"image_size is 32, .* 16 pixels"):
        load_data(config(image_size=32))
    with pytest.raises(ValueError, match=r"num_classes is 3, .* has 2"):
        load_data(config(num_classes=3))
    build_cache(config_for(source, tmp_path / "plain", "data.horizontal_flip=false"))
    plain = DataConfig(source="cache", path=str(tmp_path / "plain"), horizontal_flip=True)
    with pytest.raises(ValueError, match="has no mirrored images"):
        load_data(plain)


def test_what_is_no_finished_cache_is_told_apart(source, tmp_path):
    def found(path):
        with pytest.raises(FileNotFoundError) as error:
            load_data(DataConfig(source="cache", path=str(path)))
        return str(error.value)

    assert "none does not exist" in found(tmp_path / "none")
    (tmp_path / "images.npz").write_bytes(b"")
    for path in (tmp_path / "images.npz", source / "images"):
        assert "is not a cache, as" in found(path) and "data.source: npz" in found(path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "settings.json").write_text("{}")
    assert "unfinished cache: index.json is missing; run `mhla-gen cache`" in found(
        tmp_path / "cache"
    )


def test_a_cache_knows_its_autoencoder(source, cache):
    data = CachedLatents.open(cache)
    vae = data.autoencoder()
    assert vae.config.scaling_factor == 0.18215
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    with pytest.raises(ValueError, match="made by a different autoencoder"):
        data.require_autoencoder(vae)
    with pytest.raises(ValueError, match="AutoencoderKLWan"):
        data.require_autoencoder(tiny_wan_autoencoder())


def test_an_image_is_a_clip_of_one_frame(source, tmp_path):
    tiny_wan_autoencoder().save_pretrained(tmp_path / "wan")
    build_cache(config_for(source, tmp_path / "video", f"vae.path={tmp_path / 'wan'}"))
    video = CachedLatents.open(tmp_path / "video")
    assert video.sample_shapes == ((16, 1, 2, 2),)
    frame = to_model_range(np.array(Image.open(video.describe(3)))[None, None])
    mean, std = encode(wan := video.autoencoder(), frame)
    mean, std = latent_normalisation(wan).apply(mean, std)
    torch.testing.assert_close(video.read([3])["mean"], mean)
    torch.testing.assert_close(video.read([3])["std"], std)

    stills = ["data.source=clips", "clips.missing_caption=empty", "clips.buckets=[[1, 16, 16]]"]
    build_cache(config_for(source, tmp_path / "image", *stills, "data.horizontal_flip=false"))
    image = CachedLatents.open(tmp_path / "image")
    assert image.sample_shapes == ((4, 2, 2),) and len(image) == COUNT - 1
    with pytest.raises(ValueError, match=r"clips\.condition needs a video autoencoder"):
        build_cache(
            config_for(
                source,
                tmp_path / "c",
                *stills,
                "data.horizontal_flip=false",
                "clips.condition=true",
            )
        )


def test_training_refuses_a_pipeline_with_another_autoencoder(source, cache, tmp_path):
    data = CachedLatents.open(cache)
    require_pipeline(data, str(source / "vae"))
    pipeline = tiny_dit_pipeline()
    pipeline.vae = data.autoencoder()
    pipeline.save_pretrained(tmp_path / "same")
    require_pipeline(data, str(tmp_path / "same"))
    with torch.no_grad():
        next(pipeline.vae.parameters()).add_(1)
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"model\.pretrained .*other does not fit data\.path"):
        require_pipeline(data, str(tmp_path / "other"))
    train = TrainConfig(
        data=DataConfig(source="cache", path=str(cache)),
        model=ModelConfig(pretrained=str(tmp_path / "other")),
    )
    with pytest.raises(ValueError, match="made by a different autoencoder"):
        build_task(train, data)


def test_a_dry_run_writes_nothing(source, tmp_path, capsys):
    config = config_for(source, tmp_path / "cache")
    save_config(config, tmp_path / "cache.yaml")
    assert main(["cache", str(tmp_path / "cache.yaml"), "--dry-run"]) == 0
    assert "22 images of 2 classes, [3, 16, 16]" in capsys.readouterr().out
    assert main(["cache", str(tmp_path / "cache.yaml"), "data.image_size=12", "--dry-run"]) == 2
    assert "sizes that are multiples of 8, found 12 × 12" in capsys.readouterr().err
    assert main(["cache", str(tmp_path / "cache.yaml"), f"vae.path={tmp_path}"]) == 2
    assert "is neither a saved pipeline" in capsys.readouterr().err
    assert main(["cache", str(tmp_path / "cache.yaml"), "vae.path=/no/such/folder"]) == 2
    assert "/no/such/folder: there is no such folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["cache.yaml"]


def kinds():
    channels = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 2}
    shifted = diffusers.AutoencoderKL(
        **channels, **blocks, scaling_factor=0.3, shift_factor=0.7, latent_channels=4
    )
    means = diffusers.AutoencoderKL(
        **channels, **blocks, scaling_factor=0.5, latents_mean=[1, 2, 3, 4], latents_std=[2] * 4
    )
    small = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=3.0,
    )
    deep = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.4,
    )
    return [shifted, means, small, deep, tiny_wan_autoencoder(), autoencoder_of_ltx()]


def test_every_class_is_normalised_as_its_pipelines_do(tmp_path):
    def columns(values, latents):
        return torch.tensor(values).view(1, -1, *[1] * (latents.ndim - 2))

    def expected(vae, z):
        config = vae.config
        if isinstance(vae, diffusers.AutoencoderKLWan):
            return (z - columns(config.latents_mean, z)) * (1 / columns(config.latents_std, z))
        if isinstance(vae, diffusers.AutoencoderKLLTXVideo):
            return diffusers.LTXImageToVideoPipeline._normalize_latents(
                z, vae.latents_mean, vae.latents_std, config.scaling_factor
            )
        if config.get("latents_mean"):
            mean, std = columns(config.latents_mean, z), columns(config.latents_std, z)
            return (z - mean) * config.scaling_factor / std
        if isinstance(vae, diffusers.AutoencoderTiny):
            return z
        return (z - (config.get("shift_factor") or 0)) * config.scaling_factor

    for number, vae in enumerate(kinds()):
        vae.save_pretrained(tmp_path / str(number))
        loaded = load_autoencoder(AutoencoderConfig(path=str(tmp_path / str(number))))
        assert type(loaded) is type(vae)
        video = isinstance(vae, diffusers.AutoencoderKLWan | diffusers.AutoencoderKLLTXVideo)
        frames = (9,) if video else ()
        mean, std = encode(loaded, torch.rand(1, 3, *frames, 64, 96) * 2 - 1)
        assert mean.shape[1:] == latent_shape(loaded, frames[0] if video else 1, 64, 96)
        found, spread = latent_normalisation(loaded).apply(mean, std)
        torch.testing.assert_close(found, expected(vae, mean))
        if std is None:
            assert isinstance(vae, diffusers.AutoencoderTiny | diffusers.AutoencoderDC)
        else:
            both = latent_normalisation(loaded).apply(mean + std, None)[0]
            torch.testing.assert_close(found + spread, both)


def test_sizes_that_an_autoencoder_does_not_take_are_refused():
    with pytest.raises(ValueError, match="multiples of 8, found 20 × 16"):
        latent_shape(tiny_autoencoder(), 1, 20, 16)
    with pytest.raises(ValueError, match="encodes images, found clips of 5 frames"):
        latent_shape(tiny_autoencoder(), 5, 16, 16)
    with pytest.raises(ValueError, match="1 \\+ a multiple of 4 frames, found 8"):
        latent_shape(tiny_wan_autoencoder(), 8, 16, 16)
