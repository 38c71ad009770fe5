"""Text and image to video by one model, as Wan 2.2's TI2V-5B: its autoencoder, a time per token."""

import imageio.v3 as iio
import pytest
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from test_video import wan_run
from tiny import tiny_clip_cache, tiny_wan, tiny_wan22_autoencoder, tiny_wan_pipeline
from tiny_sampling import set_of

from mhla_gen.config.previews import PreviewConfig
from mhla_gen.data import load_data
from mhla_gen.sampling import sample
from mhla_gen.training import rehearse, train


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    pipeline = tiny_wan_pipeline(text=True)
    parts = pipeline.components | {
        "vae": tiny_wan22_autoencoder(),
        "transformer": tiny_wan(in_channels=8, out_channels=8),
    }
    pipeline = WanPipeline(**parts, expand_timesteps=True)
    buckets = "clips.buckets=[[9, 32, 64], [9, 64, 32], [1, 32, 64]]"
    folder = tmp_path_factory.mktemp("clips")
    return tiny_clip_cache(folder, buckets, "clips.upscale=true", clips=1, pipeline=pipeline)


@pytest.mark.parametrize("first_frame", [False, True])
def test_from_clips_to_mp4(cache, tmp_path, first_frame):
    model = {"pretrained": str(cache.parent / "pipeline")}
    wan = {"first_frame": first_frame, "save_text_encoder": not first_frame}
    samples = PreviewConfig(num_images=1, num_inference_steps=2)
    config = wan_run(tmp_path / "run", cache, wan, model, sample_every=2, samples=samples)
    assert {shape[1:] for shape in load_data(config.data).sample_shapes} == {
        (3, 2, 4), (3, 4, 2), (1, 2, 4)
    }  # fmt: skip
    train(config)
    preview = iio.imread(tmp_path / "run" / "previews" / "clip-0000002-00.mp4", plugin="FFMPEG")
    assert preview.shape[0] == 9 and set(preview.shape[1:3]) == {32, 64}
    folder = tmp_path / "run" / "pipeline"
    if first_frame:
        found = WanImageToVideoPipeline.from_pretrained(
            folder, tokenizer=None, text_encoder=None, transformer_2=None,
            image_encoder=None, image_processor=None,
        )  # fmt: skip
        assert found.config.expand_timesteps and found.vae_scale_factor_spatial == 16
        return
    sizes = {"height": 32, "width": 64, "num_frames": 5, "device": "cpu"}
    sample(set_of(tmp_path / "set", folder, prompts="a red square", guidance_scale=3.0, **sizes))
    video = iio.imread(tmp_path / "set" / "videos" / "000000.mp4", plugin="FFMPEG")
    assert video.shape == (5, 32, 64, 3)
    assert Image.open(tmp_path / "set" / "samples.png").width > 5 * 64


def test_sides_that_tokens_do_not_tile_are_refused(cache, tmp_path):
    odd = tiny_clip_cache(
        tmp_path, "clips.buckets=[[9, 32, 48]]", clips=1,
        pipeline=WanPipeline.from_pretrained(cache.parent / "pipeline", transformer_2=None),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"32 for Wan 2\.2's 5B"):
        rehearse(wan_run(tmp_path / "run", odd))
