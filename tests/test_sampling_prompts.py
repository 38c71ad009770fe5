"""Images and videos of prompts: Wan text- and image-to-video, both experts, PixArt."""

import json
from types import SimpleNamespace

import decord
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from commands import interrupted
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import save_file
from tiny import (
    tiny_autoencoder,
    tiny_pixart,
    tiny_umt5,
    tiny_wan,
    tiny_wan_autoencoder,
    tiny_wan_pipeline,
)
from tiny_sampling import set_of

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.errors import UserError
from mhla_gen.media.frames import visible_pixels
from mhla_gen.media.videos import write_video
from mhla_gen.sampling import sample
from mhla_gen.sampling.prompt_sampler import PromptSampler
from mhla_gen.sampling.prompts import Prompt, read_prompts

SIZE = {"height": 32, "width": 48, "num_frames": 5}


def frames_of(path):
    reader = decord.VideoReader(str(path))
    return np.stack([visible_pixels(reader[i].asnumpy()) for i in range(len(reader))]), reader


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    pipe = tiny_wan_pipeline(two_experts=True, text=True)
    mhla_gen.inject(pipe, MHLAConfig(layout=(1, 2, 2), layers="2/3")).save_pretrained(folder)
    return folder


def wan_set(folder, wan, **changes):
    options = {"guidance_scale": 4.0, "guidance_scale_2": 3.0, **SIZE}
    return set_of(folder, wan, **options | changes)


def test_videos_of_prompts_from_a_file_go_on_after_an_interruption(wan, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a red square"}, {"prompt": "moves left", "seed": 7}, {"prompt": "up"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {
        "prompts": str(prompts),
        "scheduler": "UniPCMultistepScheduler",
        "scheduler_options": {"flow_shift": 5.0},
        "formats": ["mp4", "npz"],
        "fps": 8,
    }
    config = wan_set(tmp_path / "set", wan, **options)
    with interrupted(PromptSampler, "draw", after=1):
        sample(config)
    assert [p.name for p in (tmp_path / "set" / "videos").iterdir()] == ["000000.mp4"]
    sample(config)
    files = sorted((tmp_path / "set" / "videos").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.mp4" for i in range(3)]
    with np.load(tmp_path / "set" / "samples.npz") as arrays:
        videos = arrays["arr_0"]
    assert videos.shape == (3, 5, 32, 48, 3) and len(arrays.files) == 1
    for number, file in enumerate(files):
        frames, reader = frames_of(file)
        assert frames.shape == videos[number].shape and reader.get_avg_fps() == 8
        # But for compression, which leaves less than another video does.
        off = np.abs(frames.astype(int) - videos).mean((1, 2, 3, 4))
        assert off[number] < 0.7 * np.delete(off, number).min(), off
    records = [json.loads(x) for x in (tmp_path / "set" / "samples.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in records] == [0, 7, 2**30] and records[1]["prompt"] == "moves left"
    made = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert made["samples"] == records and made["scheduler"]["flow_shift"] == 5.0
    assert {"transformer", "transformer_2", "vae"} <= set(made["identity"]["weights"])
    sheet = Image.open(tmp_path / "set" / "samples.png")
    assert sheet.width > 5 * 48 and sheet.height > 3 * 32
    # Batches of prompts change nothing, and other prompts are another set.
    other = wan_set(tmp_path / "batch", wan, **options | {"formats": ["npz"], "batch_size": 3})
    sample(other)
    first, second = (tmp_path / name / "samples.npz" for name in ("set", "batch"))
    assert first.read_bytes() == second.read_bytes()
    prompts.write_text('{"prompt": "down"}\n' * 3)
    with pytest.raises(FileExistsError, match="samples: found"):
        sample(config)


def test_samples_of_a_prompt_have_seeds_of_their_own(wan, tmp_path):
    options = {"num_frames": 1, "formats": ["npz"], "samples_per_prompt": 2}
    sample(wan_set(tmp_path / "two", wan, prompts=["a red square", "up"], **options))
    with np.load(tmp_path / "two" / "samples.npz") as arrays:
        videos = arrays["arr_0"]
    assert videos.shape[:2] == (4, 1)
    one = wan_set(
        tmp_path / "one", wan, prompts="up", seed=3 * 2**30, num_frames=1, formats=["npz"]
    )
    sample(one)
    with np.load(tmp_path / "one" / "samples.npz") as arrays:
        assert (arrays["arr_0"][0] == videos[3]).all()


def test_embeddings_in_a_file_stand_for_the_text_encoder(wan, tmp_path):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(wan)
    texts = ["a red square", "up"]
    # One by one, as one by one they are sampled: the last bits depend on the batch.
    length = {"max_sequence_length": 512, "device": torch.device("cpu")}
    with torch.no_grad():
        pairs = [pipe.encode_prompt([text], [""], True, **length) for text in texts]
    positive = torch.cat([one for one, _ in pairs])
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": pairs[0][1].contiguous()}
    save_file(embeds, tmp_path / "embeds.safetensors")
    options = {"formats": ["npz"], "num_frames": 1}
    sample(wan_set(tmp_path / "text", wan, prompts=texts, **options))
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "silent")
    given = {"prompt_embeds": str(tmp_path / "embeds.safetensors"), **options}
    sample(wan_set(tmp_path / "file", tmp_path / "silent", **given))
    first, second = (tmp_path / name / "samples.npz" for name in ("text", "file"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(ValueError, match="no text encoder; give prompt_embeds=FILE"):
        sample(wan_set(tmp_path / "none", tmp_path / "silent", prompts=texts, **options))
    with pytest.raises(
        ValueError, match=r"prompt_embeds must be \[3, tokens, text_dim\], found \[2"
    ):
        sample(wan_set(tmp_path / "none", wan, prompts=["a", "b", "c"], **given))


@pytest.fixture(scope="module")
def image_to_video(tmp_path_factory):
    folder = tmp_path_factory.mktemp("i2v")
    torch.manual_seed(0)
    tokenizer, text_encoder = tiny_umt5()
    donor = tiny_wan_pipeline()
    WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_wan_autoencoder(),
        scheduler=donor.scheduler,
        image_processor=None,
        image_encoder=None,
        # Noise, a mask of four frames, and the latents of the image.
        transformer=mhla_gen.inject(tiny_wan(in_channels=36), MHLAConfig(layout=(1, 2, 2))),
    ).save_pretrained(folder)
    return folder


def test_images_start_videos(image_to_video, tmp_path, monkeypatch):
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    for name, colour in colours.items():
        Image.new("RGB", (48, 32), colour).save(tmp_path / f"{name}.png")
    lines = [{"prompt": "up", "image": f"{name}.png", "seed": 0} for name in colours]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    embeds = {"prompt_embeds": torch.randn(1, 7, 16).repeat(2, 1, 1)}
    embeds["negative_prompt_embeds"] = torch.randn(1, 7, 16)
    save_file(embeds, tmp_path / "embeds.safetensors")
    options = {"prompts": str(tmp_path / "p.jsonl"), "formats": ["npz"], "batch_size": 2, **SIZE}
    options["prompt_embeds"] = str(tmp_path / "embeds.safetensors")
    sample(set_of(tmp_path / "set", image_to_video, reproducible=False, **options))
    with np.load(tmp_path / "set" / "samples.npz") as arrays:
        first, second = arrays["arr_0"]
    # The same noise and prompt: only the image tells them apart.
    assert (first != second).any()
    with pytest.raises(ValueError, match="needs an image; prompt 0 has none"):
        sample(set_of(tmp_path / "none", image_to_video, prompts="up", **SIZE))
    Image.new("RGBA", (48, 32)).save(tmp_path / "blue.png")
    with pytest.raises(ValueError, match=r"blue\.png of prompt 1 has transparent pixels"):
        sample(set_of(tmp_path / "none", image_to_video, **options))
    (tmp_path / "blue.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"blue\.png of prompt 1 does not exist"):
        sample(set_of(tmp_path / "none", image_to_video, **options))
    Image.new("RGB", (48, 32)).save(tmp_path / "blue.png")
    monkeypatch.setattr("mhla_gen.sampling.prompt_sampler.is_ftfy_available", lambda: False)
    with pytest.raises(ValueError, match="pip install ftfy"):
        options["prompt_embeds"] = None
        sample(set_of(tmp_path / "none", image_to_video, **options))


def test_images_of_prompts_from_another_family(tmp_path):
    tokenizer, text_encoder = tiny_umt5()
    transformer = tiny_pixart(caption_channels=16, sample_size=32, out_channels=8)
    PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_autoencoder(),
        transformer=mhla_gen.inject(transformer, MHLAConfig(layout=(2, 2))),
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(tmp_path / "pixart")
    options = {"prompts": ["a red square", "up"], "guidance_scale": 4.0}
    sample(set_of(tmp_path / "set", tmp_path / "pixart", **options))
    pictures = [Image.open(tmp_path / "set" / "images" / f"00000{i}.png") for i in range(2)]
    assert [picture.size for picture in pictures] == [(256, 256)] * 2
    assert not np.array_equal(*map(np.asarray, pictures))
    with pytest.raises(ValueError, match="PixArtAlphaPipeline takes no num_frames"):
        sample(set_of(tmp_path / "no", tmp_path / "pixart", num_frames=5, **options))


class Recorder:
    """A pipeline that makes black images and keeps its negative prompts."""

    text_encoder = object()
    transformer = SimpleNamespace(config=SimpleNamespace(), modules=list)

    def __init__(self):
        self.negatives = {}

    def __call__(
        self,
        prompt=None,
        negative_prompt=None,
        height=8,
        width=8,
        num_inference_steps=1,
        generator=None,
        output_type="pt",
        return_dict=False,
    ):
        for number, text in enumerate(prompt):
            self.negatives[text] = None if negative_prompt is None else negative_prompt[number]
        return (torch.zeros(len(prompt), 3, height, width),)


@pytest.mark.parametrize("together", [False, True])
def test_a_prompt_has_its_own_negative_prompt_or_the_pipelines(together):
    pipeline = Recorder()
    expected = {"a": None, "b": "blurred", "c": "", "d": None}
    prompts = [Prompt(text, negative_prompt=negative) for text, negative in expected.items()]
    sampler = PromptSampler(pipeline, prompts, seed=0, sizes={"height": None, "width": None})
    for numbers in [range(4)] if together else [[i] for i in range(4)]:
        assert sampler.draw(numbers, 1).shape == (len(numbers), 8, 8, 3)
    assert pipeline.negatives == expected

    class Guided(Recorder):
        def __call__(self, prompt=None, height=8, width=8):
            """As that of a guidance-distilled model."""

    with pytest.raises(UserError, match="Guided takes no negative_prompt"):
        PromptSampler(Guided(), prompts, seed=0, sizes={"height": None, "width": None})


def test_prompts_from_text_lists_and_files(tmp_path):
    assert read_prompts("a cat") == [Prompt("a cat")]
    assert read_prompts(["a", "b"]) == [Prompt("a"), Prompt("b")]
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  two dogs \n")
    assert read_prompts(str(file)) == [Prompt("a cat"), Prompt("two dogs")]
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="has no prompt; write one per line"):
        read_prompts(str(file))
    (tmp_path / "marked.txt").write_bytes("\ufeffa red square\r\ntwo\r\n".encode())
    assert [p.prompt for p in read_prompts(str(tmp_path / "marked.txt"))] == ["a red square", "two"]
    (tmp_path / "other.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"other\.txt is not UTF-8"):
        read_prompts(str(tmp_path / "other.txt"))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        read_prompts(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("mark", "\u2028\u2029\x85\x0b\x0c\x1c")
def test_only_line_feeds_end_a_prompt(tmp_path, mark):
    text = f"A cat{mark}on a roof"
    lines = json.dumps({"prompt": text}, ensure_ascii=False) + '\r\n\r\n{"prompt": "a dog"}\n'
    (tmp_path / "p.jsonl").write_text(lines, encoding="utf-8", newline="")
    (tmp_path / "p.TXT").write_text(f"{text}\n a dog\r\n", encoding="utf-8", newline="")
    for name in ("p.jsonl", "p.TXT"):
        assert read_prompts(str(tmp_path / name)) == [Prompt(text), Prompt("a dog")]


def test_files_of_other_kinds_are_not_drawn_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").write_text("a cat")
    for name in ("p.csv", "none.json", "prompts"):
        with pytest.raises(ValueError, match=rf"prompts={name} names a file .* \.txt"):
            read_prompts(name)
    for text in ("a cat. a dog.json", "a" * 5000, "end.", "v1.5"):
        assert read_prompts(text) == [Prompt(text)]


def test_home_is_expanded_in_prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a", "image": "b.png"}\n{"prompt": "a", "image": "~/c.png"}\n'
    )
    images = [prompt.image for prompt in read_prompts("~/p.jsonl")]
    assert images == [str(tmp_path / "b.png"), str(tmp_path / "c.png")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "sed": 1}', "has the key 'sed'; known keys are prompt"),
        ('{"prompt": 3}', "prompt must be a text, found 3"),
        ('{"prompt": "a", "seed": true}', "seed must be a whole number, found True"),
        ('{"prompt": "a", "seed": 1.0}', "seed must be a whole number, found 1.0"),
        ('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is given twice"),
        ('{"prompt": NaN}', "NaN is not a number"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ('{"seed": 1}', "has no prompt"),
        ('{"prompt": "a", "seed": -1}', r"seed must be in \[0, 4294967295\], found -1"),
        ('["a"]', "must be an object"),
        ('{"prompt"', "is not JSON"),
    ],
)
def test_lines_that_are_no_prompts_are_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"prompts\.jsonl, line 2.*{message}"):
        read_prompts(str(file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": None}, "takes prompts; set prompts=TEXT or FILE"),
        ({"classes": [1]}, "classes is set, but the WanPipeline"),
        ({"guidance_interval": (0.1, 0.9)}, "guidance_interval is set"),
        ({"height": 40}, "height must be a multiple of 16, found 40"),
        ({"num_frames": 6}, "num_frames must be 1 . a multiple of 4, found 6"),
        ({"formats": ["png"]}, "formats has png, but the samples are videos"),
        ({"scheduler": "DDPMScheduler"}, "cannot take flow_prediction"),
    ],
)
def test_settings_that_do_not_fit_prompts_are_named(wan, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        sample(wan_set(tmp_path / "set", wan, **{"prompts": "up"} | changes))
    assert not (tmp_path / "set").exists()


def test_a_video_file_has_the_frames_it_was_given(tmp_path):
    frames = np.zeros((7, 34, 50, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 240, 7)[:, None, None]
    write_video(tmp_path / "a.mp4", frames, fps=12)
    found, reader = frames_of(tmp_path / "a.mp4")
    assert found.shape == frames.shape and reader.get_avg_fps() == 12
    assert np.abs(found.astype(int) - frames).mean() < 6
    assert imageio.get_reader(tmp_path / "a.mp4").get_meta_data()["codec"] == "h264"
    with pytest.raises(ValueError, match="even height and width, found 33 × 50"):
        write_video(tmp_path / "b.mp4", frames[:, :33], fps=12)
