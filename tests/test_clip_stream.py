"""Clips made chunk by chunk: the pipeline, and `mhla-gen sample`."""

import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from tiny import disturb, tiny_wan22_autoencoder, tiny_wan_autoencoder, tiny_wan_pipeline
from tiny_sampling import set_of

import mhla_gen
from mhla_gen import ClipState, MHLAConfig
from mhla_gen.errors import UserError
from mhla_gen.pipelines.clip_stream import FrameDecoder, stream_clip
from mhla_gen.pipelines.noise import chunk_seed, generator_of, sample_seed
from mhla_gen.sampling import sample

SIZE = {"height": 32, "width": 48, "num_frames": 21}  # 6 latent frames
OPTIONS = {**SIZE, "num_inference_steps": 2, "guidance_scale": 3.0, "seed": 5}


def causal_pipeline(chunk=2, text=False, **changes):
    torch.manual_seed(0)
    pipe = tiny_wan_pipeline(text=text, **changes)
    mhla_gen.inject(pipe, MHLAConfig(layout=(2, 1, 2), causal_frames=chunk))
    disturb(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds():
    torch.manual_seed(1)
    return {"prompt_embeds": torch.randn(1, 7, 16), "negative_prompt_embeds": torch.randn(1, 7, 16)}


@pytest.mark.parametrize("make", [tiny_wan_autoencoder, tiny_wan22_autoencoder])
def test_frames_are_those_of_the_whole_clip_decoded_at_once(make):
    pipe = tiny_wan_pipeline()
    pipe.vae = make().eval()
    latents = torch.randn(1, pipe.vae.config.z_dim, 5, 4, 6)
    decode = FrameDecoder(pipe)
    with torch.no_grad():
        found = torch.cat([decode(part) for part in latents.split([2, 1, 2], dim=2)])
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        whole = pipe.vae.decode(latents * std + mean).sample
    expected = pipe.video_processor.postprocess_video(whole, output_type="pt")[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_clip_is_what_the_whole_model_denoises_beside_clean_frames():
    pipe, steps = causal_pipeline(), []
    chunks = list(stream_clip(pipe, **embeds(), **OPTIONS, on_step=steps.append))
    assert [len(chunk.frames) for chunk in chunks] == [5, 8, 8] and steps == [*range(1, 7)]
    # The last chunk again, by calls of the model on all frames.
    clean = torch.cat([chunk.latents for chunk in chunks[:-1]], dim=2)
    noise = generator_of(chunk_seed(5, 2))
    latents = torch.randn(1, 16, 2, 4, 6, generator=noise)
    pipe.scheduler.set_timesteps(2)
    texts = embeds().values()
    with torch.no_grad():
        for time in pipe.scheduler.timesteps:
            times = torch.cat((torch.zeros(4 * 6), time.expand(2 * 6)))[None]
            noisy = torch.cat((clean, latents), dim=2)
            positive, negative = (
                pipe.transformer(noisy, timestep=times, encoder_hidden_states=text).sample[:, :, 4:]
                for text in texts
            )
            velocity = negative + 3.0 * (positive - negative)
            latents = pipe.scheduler.step(velocity, time, latents, return_dict=False)[0]
    torch.testing.assert_close(chunks[-1].latents, latents, rtol=1e-4, atol=1e-4)


def test_no_chunk_has_the_noise_of_another_one_in_any_clip_of_a_set():
    clips, chunks = range(64), range(64)
    seeds = {chunk_seed(sample_seed(7, clip), chunk) for clip in clips for chunk in chunks}
    assert len(seeds) == len(clips) * len(chunks) and max(seeds) < 2**32
    assert chunk_seed(7, 0) == 7


def test_a_longer_clip_begins_like_a_shorter_one_and_can_be_gone_on_with():
    pipe = causal_pipeline()
    short = list(stream_clip(pipe, **embeds(), **OPTIONS))
    longer = OPTIONS | {"num_frames": 37}  # 10 latent frames
    whole = list(stream_clip(pipe, **embeds(), **longer))
    assert all(a.frames.equal(b.frames) for a, b in zip(short, whole, strict=False))
    steps = []
    finished = [chunk.latents for chunk in whole[:3]]
    again = list(stream_clip(pipe, **embeds(), **longer, finished=finished, on_step=steps.append))
    assert all(a.frames.equal(b.frames) for a, b in zip(again, whole, strict=True))
    assert len(steps) == 2 * 2


def test_an_odd_last_chunk_no_guidance_and_text():
    pipe = causal_pipeline(chunk=4, text=True)
    options = OPTIONS | {"guidance_scale": 1.0, "num_frames": 25}
    chunks = list(stream_clip(pipe, prompt="a red square", **options))
    assert [chunk.latents.shape[2] for chunk in chunks] == [4, 3]
    assert sum(len(chunk.frames) for chunk in chunks) == 25
    assert all(chunk.frames.isfinite().all() for chunk in chunks)


def test_what_cannot_stream_is_refused():
    def refused(pipe, message, **changes):
        with pytest.raises(UserError, match=message):
            next(stream_clip(pipe, **embeds(), **OPTIONS | changes))

    pipe = causal_pipeline()
    refused(pipe, "1 [+] a multiple of 4, found 20", num_frames=20)
    refused(pipe, "height must be a multiple of 16, found 40", height=40)
    refused(pipe, "width must be a multiple of 16, found 0", width=0)
    refused(pipe, "num_inference_steps must be at least 1, found 0", num_inference_steps=0)
    pair = torch.randn(2, 7, 16)
    for texts, message in (
        ({"prompt_embeds": pair}, "prompt_embeds must be of one clip, found 2; call once for each"),
        ({}, "Provide either `prompt` or `prompt_embeds`"),
    ):
        with pytest.raises(ValueError, match=message):
            next(stream_clip(pipe, **texts, **OPTIONS))
    pipe.vae.enable_tiling()
    refused(pipe, "vae_tiling=false")
    refused(causal_pipeline(two_experts=True), "with one transformer")
    refused(tiny_wan_pipeline(), "not causal over frames")
    with pytest.raises(UserError, match="not causal over frames"):
        ClipState(tiny_wan_pipeline().transformer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    causal_pipeline(text=True).save_pretrained(folder)
    return folder


def stream_set(folder, saved, **changes):
    options = {"guidance_scale": 3.0, "prompts": ["a red square", "up"], **SIZE, "num_frames": 37}
    return set_of(folder, saved, **options | changes)


def digests(folder):
    return json.loads((folder / "manifest.json").read_text())["sha256"]


def test_sample_writes_clips_while_they_are_made_and_goes_on_inside_one(
    saved, tmp_path, monkeypatch
):
    sample(stream_set(tmp_path / "whole", saved))
    files = sorted((tmp_path / "whole" / "videos").iterdir())
    assert [file.name for file in files] == ["000000.mp4", "000001.mp4"]
    frames = np.stack(list(iio.imiter(files[0])))
    assert frames.shape == (37, 32, 48, 3)
    # The same as whole arrays, which are made in the same chunks.
    sample(stream_set(tmp_path / "arrays", saved, formats=["npz"]))
    assert digests(tmp_path / "whole") == digests(tmp_path / "arrays")
    with np.load(tmp_path / "arrays" / "samples.npz") as arrays:
        whole = arrays["arr_0"][0].astype(int)
    # But for compression, which leaves less than a step of one frame does.
    assert np.abs(whole - frames).mean() < 0.7 * np.abs(whole[1:] - frames[:-1]).mean()

    call, calls = ClipState.__call__, []

    def counted(self, *args, **options):
        if not calls or calls[-1] is not None:
            calls.append(options.get("append", False))
        if calls.count(True) == 6:  # two branches: in the fourth chunk
            calls.append(None)
            raise KeyboardInterrupt
        return call(self, *args, **options)

    config = stream_set(tmp_path / "half", saved)
    with monkeypatch.context() as patch:
        patch.setattr(ClipState, "__call__", counted)
        with pytest.raises(KeyboardInterrupt):
            sample(config)
    assert not list((tmp_path / "half" / "videos").glob("*.mp4"))
    kept = tmp_path / "half" / ".work" / "latents" / "000000"
    assert len(list(kept.iterdir())) == 2
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            ClipState, "__call__", lambda self, *x, **o: calls.append(o) or call(self, *x, **o)
        )
        sample(config)
    assert digests(tmp_path / "half") == digests(tmp_path / "whole")
    # Of 2 clips with 5 chunks, 2 chunks are read and not denoised again.
    assert sum(not o.get("append") for o in calls) == 2 * 2 * (10 - 2)
    assert not (tmp_path / "half" / ".work").exists()


def test_a_second_guidance_is_refused_and_a_rehearsal_makes_one_chunk(saved, tmp_path, capsys):
    with pytest.raises(UserError, match="guidance_scale_2"):
        sample(stream_set(tmp_path / "set", saved, guidance_scale_2=2.0))
    sample(stream_set(tmp_path / "set", saved, num_inference_steps=20), dry_run=True)
    assert "would write 2 videos" in capsys.readouterr().out
    assert not (tmp_path / "set").exists()
