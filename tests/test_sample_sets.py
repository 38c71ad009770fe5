"""Sample sets on disk: the same for any batches, starts and processes; what is in them."""

import json
import math
import random
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import finish, interrupted, launch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from tiny_sampling import arrays_of, latent_pipeline, set_of, tiny_pipeline

from mhla_gen import MHLADiTTransformer2DModel
from mhla_gen.cli import main
from mhla_gen.config import ConfigError, SampleConfig, load_config, save_config
from mhla_gen.errors import UserError
from mhla_gen.evaluation import load_images
from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.pipelines.classes import class_numbers
from mhla_gen.pipelines.noise import sample_seed
from mhla_gen.sampling import class_labels, estimate, generate, sample
from mhla_gen.sampling.batched_sampler import BatchedSampler, largest_batch
from mhla_gen.sampling.labels import ordered_labels
from mhla_gen.sampling.repeatable import InParts, in_parts
from mhla_gen.sampling.samplers import ClassSampler
from mhla_gen.sampling.units import Units


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipe")
    torch.manual_seed(0)
    tiny_pipeline(class_names=["cat, house cat", "dog", "3"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    latent_pipeline(scheduler).save_pretrained(folder)
    return folder


def bytes_of(folder):
    return (folder / "samples.npz").read_bytes()


def interrupt(config, after):
    """Start a set and stop it when so many calls of the pipeline are done."""
    with interrupted(ClassSampler, "draw", after):
        sample(config)


@pytest.mark.parametrize(("model", "count"), [("pipeline", 23), ("latents", 10)])
def test_a_set_is_the_same_for_any_batch_and_any_starts(model, count, request, tmp_path):
    saved = request.getfixturevalue(model)
    # The last of the units is not full.
    options = {"num_samples": count, "model_batch_size": 4}
    sample(set_of(tmp_path / "one", saved, batch_size=1, **options))
    for size in (7, 23):
        sample(set_of(tmp_path / f"b{size}", saved, batch_size=size, **options))
        assert bytes_of(tmp_path / f"b{size}") == bytes_of(tmp_path / "one")
    for start, size in enumerate((1, 5)):
        config = set_of(tmp_path / "parts", saved, batch_size=size, **options)
        interrupt(config, after=1)
        assert not (tmp_path / "parts" / "samples.npz").exists()
        assert len(list((tmp_path / "parts" / ".work" / "done").iterdir())) == start + 1
        with pytest.raises(EvaluationError, match=r"unfinished .* sample .*config\.yaml"):
            load_images(tmp_path / "parts")
    sample(set_of(tmp_path / "parts", saved, batch_size=23, **options))
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "one")
    assert not (tmp_path / "parts" / ".work").exists()
    arrays = arrays_of(tmp_path / "one")
    classes = 3 if model == "pipeline" else 1000
    assert arrays["labels"].tolist() == [i % classes for i in range(count)]
    assert len({image.tobytes() for image in arrays["arr_0"]}) == count


@pytest.mark.parametrize("damage", ["halved", "emptied", "missing", "changed"])
@pytest.mark.parametrize("formats", ["npz", "png"])
def test_damaged_units_are_drawn_again(damage, formats, pipeline, tmp_path):
    options = {"num_samples": 5, "model_batch_size": 2, "formats": (formats,)}
    sample(set_of(tmp_path / "one", pipeline, **options))
    config = set_of(tmp_path / "two", pipeline, **options)
    interrupt(config, after=2)
    files = [p for p in (tmp_path / "two").rglob("*") if p.is_file()]
    files = [p for p in files if p.suffix in (".npy", ".png") or p.parent.name == "done"]
    assert len(files) > 6
    whole = shutil.copytree(tmp_path / "two", tmp_path / "copy")
    for path in files:
        shutil.rmtree(tmp_path / "two")
        shutil.copytree(whole, tmp_path / "two")
        if damage == "changed":
            # The size is right: it is found where the samples are joined, and named.
            if path.parent.name != "samples":
                continue
            path.write_bytes(path.read_bytes()[:-4] + b"abcd")
            with pytest.raises(UserError, match=rf"{path} is damaged .*; remove it and give the"):
                sample(config)
            path.unlink()
        elif damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 * (damage == "halved")])
        sample(config)
        made = [
            {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.[np][pn][zg]")}
            for name in ("one", "two")
        ]
        assert made[0] == made[1] and len(made[0]) > 1, path


@pytest.mark.parametrize("damage", ["halved", "emptied", "missing"])
def test_a_finished_set_that_lost_samples_is_not_finished(damage, pipeline, tmp_path, capsys):
    config = set_of(tmp_path / "set", pipeline, samples_per_class=1, formats=("npz", "png"))
    sample(config)
    expected = bytes_of(tmp_path / "set")
    names = ["samples.npz", "samples.jsonl", "images/000001.png", "manifest.json"]
    for name in names:
        path = tmp_path / "set" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2 * (damage == "halved")])
        if damage == "missing":
            path.unlink()
        if (damage, name) != ("missing", "manifest.json"):
            named = path.parent if path.parent.name == "images" else path
            with pytest.raises(UserError, match=rf"{named} is damaged .*; remove .* again"):
                sample(config)
            (tmp_path / "set" / "manifest.json").unlink()
        sample(config)
        assert bytes_of(tmp_path / "set") == expected


@pytest.mark.parametrize("damage", ["emptied", "missing"])
def test_units_of_who_knows_what_are_not_gone_on_with(damage, pipeline, tmp_path):
    config = set_of(tmp_path / "set", pipeline, num_samples=5, model_batch_size=2)
    interrupt(config, after=1)
    path = tmp_path / "set" / ".work" / "identity.json"
    path.write_bytes(b"")
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match=rf"{path} is damaged .*; remove .*\.work to sample"):
        sample(config)


def test_what_is_not_repeatable_differs_by_rounding_at_most(latents, tmp_path):
    options = {"num_samples": 6, "reproducible": False}
    for size in (4, 6):
        sample(set_of(tmp_path / str(size), latents, batch_size=size, **options))
    first, second = (arrays_of(tmp_path / str(n))["arr_0"] for n in (4, 6))
    assert np.abs(first.astype(int) - second).max() <= 1


def test_a_small_set_in_memory_is_that_on_disk(pipeline, tmp_path):
    sample(set_of(tmp_path / "set", pipeline, samples_per_class=3, seed=5, guidance_scale=3.0))
    labels = class_labels("all", 3, 3)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    pipe = drawing_pipeline(pipeline)
    options = {"seed": 5, "num_inference_steps": 2, "guidance_scale": 3.0}
    for size in (1, 4, 9):
        images = generate(pipe, labels, batch_size=size, **options)
        assert (images == arrays_of(tmp_path / "set")["arr_0"]).all()
    # The pipeline is left as it was.
    assert "forward" not in vars(pipe.transformer)


def drawing_pipeline(folder):
    from mhla_gen import ClassConditionalPipeline

    return ClassConditionalPipeline.from_pretrained(folder)


def test_sets_of_other_seeds_share_no_noise(pipeline, tmp_path):
    """Seed 0 and 1 with `seed + i` would share all but one; sample 0 has the noise of its seed."""
    count, starts = 50_000, (0, 1, 2, 3, 65_535)
    seeds = {sample_seed(seed, number) for seed in starts for number in range(count)}
    assert len(seeds) == len(starts) * count and max(seeds) < 2**32
    assert all(sample_seed(seed, 0) == seed for seed in (0, 7, 2**32 - 1))
    for seed in (0, 1):
        sample(set_of(tmp_path / str(seed), pipeline, classes=[0], num_samples=6, seed=seed))
    first, second = (arrays_of(tmp_path / str(seed))["arr_0"].tolist() for seed in (0, 1))
    assert not [image for image in first if image in second]


def test_a_sample_set_on_disk(pipeline, tmp_path, capsys):
    config = set_of(tmp_path / "set", pipeline, classes=[2, 0], samples_per_class=2)
    sample(config, dry_run=True)
    said = capsys.readouterr().out
    assert "would write 4 images of 2 classes" in said and "2 steps each: 8 × 8 × 1" in said
    assert "npz 256 B" in said and "samples/s" in said and not (tmp_path / "set").exists()
    sample(config)
    arrays = arrays_of(tmp_path / "set")
    assert arrays["arr_0"].shape == (4, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
    assert arrays["labels"].tolist() == [2, 2, 0, 0] and arrays["labels"].dtype == np.int64
    assert {p.name for p in (tmp_path / "set").iterdir()} == {
        "config.yaml",
        "manifest.json",
        "samples.npz",
        "samples.png",
    }
    made = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert made["num_images"] == 4 and made["settings"]["seed"] == 0
    assert made["transformer"]["mhla"]["layout"] == [2, 2]
    assert len(made["identity"]["weights"]["transformer"]) == 64
    assert {"torch", "diffusers", "mhla_gen"} <= set(made["versions"])
    assert made["command"] and made["devices"] and len(made["sha256"]) == 64
    # With what the pipeline says where nothing was given.
    own = {"guidance_scale": 1.5, "dtype": "float32", "fps": 16.0}
    assert load_config(tmp_path / "set" / "config.yaml") == replace(config, **own)
    written = (tmp_path / "set" / "samples.npz").stat().st_mtime_ns
    sample(replace(config, batch_size=1))
    assert "already holds" in capsys.readouterr().out
    assert (tmp_path / "set" / "samples.npz").stat().st_mtime_ns == written


@pytest.mark.parametrize(("patience", "rows"), [(0.0, 1), (math.inf, 4)])
def test_a_rehearsal_says_first_what_it_times(
    pipeline, tmp_path, monkeypatch, capsys, patience, rows
):
    """A call of all samples of a unit takes many minutes on a CPU."""
    told, calls = [], []
    draw = ClassSampler.draw

    def watched(self, numbers, *rest):
        told.append(capsys.readouterr().err)
        calls.append(len(numbers))
        return draw(self, numbers, *rest)

    monkeypatch.setattr(estimate, "_PATIENCE", patience)
    monkeypatch.setattr(ClassSampler, "draw", watched)
    config = set_of(tmp_path / "set", pipeline, num_samples=8, model_batch_size=4, device="cpu")
    sample(config, dry_run=True)
    assert "timing 2 of 2 steps with 1 sample\n" in told[0]
    assert calls == [1, rows][: 1 + (rows > 1)]
    assert f"one of 2 steps with {rows} sample" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: found 0, asked for 1"),
        ({"num_samples": 9}, "num_samples: found 8, asked for 9"),
        ({"scheduler_options": {"shift": 2.0}}, "scheduler_options.shift: found None"),
        ({"model_batch_size": 2}, "model_batch_size: found 4, asked for 2"),
    ],
)
def test_other_settings_are_refused_for_an_unfinished_set(pipeline, tmp_path, changes, message):
    config = set_of(tmp_path / "set", pipeline, num_samples=8, model_batch_size=4)
    interrupt(config, after=1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=message):
        sample(replace(config, **changes))
    assert sorted(tmp_path.rglob("*")) == before


def test_another_model_at_the_same_place_is_refused(pipeline, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    config = set_of(tmp_path / "set", tmp_path / "pipe", num_samples=8, model_batch_size=4)
    interrupt(config, after=1)
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match=r"weights\.transformer: found"):
        sample(config)


def test_classes_by_number_and_name():
    names = ["cat, house cat", "dog", "3"]
    assert class_numbers(["House Cat", 1, "3"], names) == (0, 1, 2)
    assert class_numbers(["cat, house cat"], names) == (0,)
    with pytest.raises(ValueError, match="no class 'cta'; did you mean 'cat'"):
        class_numbers(["cta"], names)
    with pytest.raises(ValueError, match="classes 0…2, found 7"):
        class_labels([7], 1, 3)
    balanced = ordered_labels("all", 8, "balanced", 0, 3)
    assert balanced.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    drawn = ordered_labels([0, 2], 400, "random", 0, 3)
    assert set(drawn.tolist()) == {0, 2} and 120 < (drawn == 0).sum() < 280
    assert (ordered_labels([0, 2], 50, "random", 0, 3) == drawn[:50]).all()
    assert (ordered_labels([0, 2], 400, "random", 1, 3) != drawn).any()


def test_image_files_are_a_set_to_measure(pipeline, tmp_path):
    config = set_of(tmp_path / "set", pipeline, num_samples=5, formats=["png", "npz"])
    sample(config)
    files = sorted((tmp_path / "set" / "images").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(5)]
    arrays = arrays_of(tmp_path / "set")
    for file, image in zip(files, arrays["arr_0"], strict=True):
        assert (np.asarray(Image.open(file)) == image[..., 0]).all()
    records = [json.loads(x) for x in (tmp_path / "set" / "samples.jsonl").read_text().splitlines()]
    assert [r["label"] for r in records] == arrays["labels"].tolist()
    assert records[4] == {"label": 1, "class": "dog", "seed": 2**29}
    (tmp_path / "set" / "samples.npz").unlink()
    # The contact sheet beside them is none of the samples.
    source = load_images(tmp_path / "set")
    assert len(source) == 5 and (source.read(0)[..., 0] == arrays["arr_0"][0, ..., 0]).all()


def out_of_memory(monkeypatch, most):
    """Let the model take `most` rows at a time, as a small GPU would; the sizes of its calls."""
    forward, sizes = MHLADiTTransformer2DModel.forward, []

    def limited(self, hidden_states, *args, **rest):
        sizes.append(len(hidden_states))
        if len(hidden_states) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, hidden_states, *args, **rest)

    monkeypatch.setattr(MHLADiTTransformer2DModel, "forward", limited)
    return sizes


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(
    pipeline, tmp_path, monkeypatch, capsys
):
    options = {"num_samples": 24, "guidance_scale": 1.0, "reproducible": False}
    sample(set_of(tmp_path / "whole", pipeline, batch_size=24, **options))
    sizes = out_of_memory(monkeypatch, most=6)
    sample(set_of(tmp_path / "small", pipeline, batch_size=24, **options))
    said = capsys.readouterr().out
    assert "out of memory with 24 samples at a time; continuing with 12" in said
    assert "continuing with 6" in said and max(sizes) == 24 and sizes[-1] == 6
    whole, small = (arrays_of(tmp_path / name)["arr_0"] for name in ("whole", "small"))
    assert np.abs(whole.astype(int) - small).max() <= 1


def test_less_memory_than_a_repeatable_call_needs_is_noted(pipeline, tmp_path, monkeypatch, capsys):
    options = {"num_samples": 8, "model_batch_size": 4}
    sample(set_of(tmp_path / "whole", pipeline, **options))
    out_of_memory(monkeypatch, most=3)
    sample(set_of(tmp_path / "small", pipeline, batch_size=8, **options))
    assert "fewer than model_batch_size 4" in capsys.readouterr().out
    made = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert any("continuing with 2" in note for note in made["notes"])
    whole, small = (arrays_of(tmp_path / name)["arr_0"] for name in ("whole", "small"))
    assert np.abs(whole.astype(int) - small).max() <= 1
    monkeypatch.undo()
    out_of_memory(monkeypatch, most=0)
    with pytest.raises(torch.OutOfMemoryError):
        sample(set_of(tmp_path / "none", pipeline, **options))


def test_the_largest_batch_is_tried_out(pipeline):
    sampler = ClassSampler(drawing_pipeline(pipeline), np.zeros(1000, np.int64), seed=0)
    tried = []

    def draw(size):
        tried.append(size)
        if size > 48:
            raise torch.OutOfMemoryError

    assert largest_batch(sampler, 1000, on_cuda=True, draw=draw) == 32
    assert tried == [1, 2, 4, 8, 16, 32, 64]
    assert largest_batch(sampler, 20, on_cuda=True, draw=draw) == 20
    assert largest_batch(sampler, 1000, on_cuda=False) == 32


def test_functions_are_called_in_parts_of_one_size():
    calls = []

    def function(x, scale, *, labels, name):
        calls.append((x.shape, labels.shape, float(scale), name))
        return (x * scale + labels[:, None], labels)

    parts = InParts(function, rows=3)
    x, labels = torch.randn(7, 2), torch.arange(7)
    sums, same = parts(x, torch.tensor(2.0), labels=labels, name="n")
    assert torch.equal(sums, x * 2 + labels[:, None]) and torch.equal(same, labels)
    assert calls == [((3, 2), (3,), 2.0, "n")] * 3
    output = InParts(lambda z: DecoderOutput(sample=z + 1), rows=2)(x)
    assert isinstance(output, DecoderOutput) and torch.equal(output.sample, x + 1)
    model = torch.nn.Linear(2, 2)
    with in_parts(model, "forward", 2) as inside:
        assert model.forward is inside and model(x).shape == (7, 2)
    assert "forward" not in vars(model)


def test_units_are_few_and_of_one_size():
    for count, most in ((1, 64), (64, 64), (65, 64), (200, 64), (7, 3)):
        units = Units.split(count, most)
        numbers = [n for unit in range(len(units)) for n in units.numbers(unit)]
        assert numbers == list(range(count)) and units.rows <= most
        assert len(units) == -(-count // most)
        assert all(len(units.filled(unit)) == units.rows for unit in range(len(units)))
    assert Units.split(200, 64).rows == 50


def test_steps_are_streamed(pipeline):
    sampler = ClassSampler(drawing_pipeline(pipeline), np.zeros(8, np.int64), seed=0)
    sampler.pipeline.set_progress_bar_config(disable=True)
    seen = []
    with BatchedSampler(sampler, Units(8, 4), 4, batch_size=8, reproducible=True) as batched:
        units = [unit for unit, _ in batched.draw([0, 1], seen.append)]
    assert units == [0, 1] and seen == [2, 4, 6, 8]


DPM = {"scheduler": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": [7]}, "found 7 in classes"),
        ({"classes": ["cow"]}, "no class 'cow'; (did you mean|among its classes are) "),
        ({"scheduler": "Euler"}, "no scheduler 'Euler'"),
        ({"scheduler": "DDPMScheduler"}, "DDPMScheduler cannot take flow_pred.*, such as Flow"),
        ({"prompts": "a cat"}, "is class-conditional"),
        ({"height": 8, "width": 12}, "must be equal, found 8 and 12"),
        ({"height": 9, "width": 9}, "^height and width must be multiples of 2 .*, found 9"),
        ({"guidance_channels": 2}, "guidance_channels must be at most 1, .* found 2"),
        (DPM | {"scheduler_options": {"algorithm_type": "x"}}, "does not take .*'x'}: x is not"),
        (DPM | {"scheduler_options": {"flow_shift": "x"}}, "cannot make num_inference_steps=40: "),
        ({"scheduler_options": {"shift": "x"}}, "FlowMatch.* does not take {'shift': 'x'}: "),
        ({"formats": "mp4"}, "formats has mp4, but the samples are images"),
        ({"vae_tiling": True}, "has no tiling"),
        ({"offload": "model", "device": "cpu"}, "offload=model needs a GPU"),
        ({"pipeline": "/no/such/place"}, "there is no such folder"),
    ],
)
def test_problems_are_named_before_anything_is_written(pipeline, tmp_path, changes, message):
    settings = {"pipeline": str(pipeline), "output_dir": str(tmp_path / "set")}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sample(SampleConfig(**settings | changes))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["samples_per_class=2", "num_samples=3"], "exclude each other"),
        (["guidance_interval=[0.9,0.1]"], "the lower one first"),
        (["guidance_interval=[0,1,2]"], "two noise levels"),
        (["batch_size=many"], 'where it is not "auto", must be'),
        (["formats=[gif]"], "one of npz, png, mp4"),
        (["keep_samples=false"], "needs evaluate, or nothing"),
        (["evaluate.samples=x"], "leave it out"),
        (["classes=[-1]"], "class numbers and names"),
        (["classes=-1"], "class numbers and names"),
        (["classes=[]"], "class numbers and names"),
        (["classes=0.5"], "class numbers and names"),
    ],
)
def test_mistakes_in_settings_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides, SampleConfig)


def test_one_class_needs_no_brackets():
    def classes(text):
        return load_config(None, [f"classes={text}"], SampleConfig).classes

    assert classes("dog") == classes("[dog]") == ("dog",)
    assert classes("3") == classes("[3]") == (3,)
    assert classes("tench, Tinca tinca") == ("tench, Tinca tinca",)
    assert classes("all") == "all"


def test_folders_of_others_and_places_that_cannot_be_written(pipeline, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="did not write"):
        sample(set_of(tmp_path / "mine", pipeline))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"
    with pytest.raises(PermissionError, match=r"notes\.txt is a file"):
        sample(set_of(tmp_path / "mine" / "notes.txt" / "set", pipeline))
    # Root has rights everywhere, but not every file system takes files.
    with pytest.raises(PermissionError, match="cannot be made"):
        sample(set_of("/proc/new/set", pipeline))


def command(config, tmp_path, **options):
    save_config(config, tmp_path / "run.yaml")
    return launch("sample", tmp_path / "run.yaml", **options)


def test_the_command_takes_a_pipeline_and_goes_to_its_folder(pipeline, tmp_path, capsys):
    rest = [f"output_dir={tmp_path / 'set'}", "num_samples=4", "num_inference_steps=1"]
    assert main(["sample", str(pipeline), "classes=dog", *rest]) == 0
    printed = capsys.readouterr()
    assert "wrote 4 images of 1 class" in printed.out and "4/4" in printed.err
    assert "sample/s" in printed.err
    assert main(["sample", str(pipeline), "classes=[cow]", *rest]) == 2
    assert "settings (classes: found ('dog',), asked for ('cow',))" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_the_same_set(latents, tmp_path):
    options = {"num_samples": 11, "model_batch_size": 4, "device": "cpu"}
    sample(set_of(tmp_path / "one", latents, **options))
    options["device"] = "auto"
    config = set_of(tmp_path / "two", latents, **options)
    printed, errors = finish(command(config, tmp_path, processes=2))
    # Once: they are no two processes that each made the set.
    assert printed.count("wrote 11 images") == 1 and "11/11" in errors
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_makes_the_same_set(latents, tmp_path):
    options = {"num_samples": 24, "model_batch_size": 2, "num_inference_steps": 8}
    sample(set_of(tmp_path / "one", latents, **options))
    config = set_of(tmp_path / "killed", latents, **options)
    marks, pick = tmp_path / "killed" / ".work" / "done", random.Random(0)
    for _ in range(3):
        before = len(list(marks.glob("*.json")))
        process = command(config, tmp_path)
        while len(list(marks.glob("*.json"))) < before + pick.randint(1, 3):
            assert process.poll() is None, "it finished before it could be killed"
            time.sleep(0.01)
        time.sleep(pick.random() * 0.1)
        process.kill()
        process.communicate()
        assert not (tmp_path / "killed" / "manifest.json").exists()
    finish(command(config, tmp_path))
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "one")
    hidden = [path for path in (tmp_path / "killed").rglob("*") if "partial" in path.name]
    assert not hidden
