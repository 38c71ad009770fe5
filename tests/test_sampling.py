"""The pipeline for any number of classes, and sample sets on disk."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny import disturb, tiny_dit, tiny_dit_pipeline

import mhla_gen
from mhla_gen import ClassConditionalPipeline, MHLAConfig
from mhla_gen.config import SampleConfig
from mhla_gen.sampling import class_labels, contact_sheet, generate, sample

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def tiny_pipeline(scheduler=None, num_classes=3, **changes):
    size = {"in_channels": 1, "num_embeds_ada_norm": num_classes, "num_layers": 2}
    model = mhla_gen.inject(tiny_dit(**size, **changes), MHLAConfig(layout=(2, 2)))
    pipe = ClassConditionalPipeline(disturb(model), scheduler or FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, labels=(0, 1, 2), **options):
    generators = [torch.Generator().manual_seed(i) for i in range(len(labels))]
    options = {"num_inference_steps": 3, "generator": generators, "output_type": "pt"} | options
    return pipe(labels, **options).images


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW),
    ],
    ids=lambda s: type(s).__name__,
)
def test_flow_schedulers_reload_exactly(tmp_path, scheduler):
    pipe = tiny_pipeline(scheduler)
    images = draw(pipe)
    assert images.shape == (3, 1, 8, 8) and 0 <= images.min() <= images.max() <= 1
    pipe.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is mhla_gen.MHLADiTTransformer2DModel
    assert torch.equal(draw(loaded), images)


def test_an_image_depends_on_its_seed_and_class_not_on_its_batch():
    pipe = tiny_pipeline()
    together = draw(pipe)
    for i in range(3):
        generator = [torch.Generator().manual_seed(i)]
        torch.testing.assert_close(draw(pipe, (i,), generator=generator), together[i : i + 1])
    assert not torch.allclose(draw(pipe, (1, 1, 1))[0], together[0])


def test_guidance_extrapolates_from_no_class():
    pipe = tiny_pipeline()
    plain, guided = draw(pipe, guidance_scale=1.0), draw(pipe, guidance_scale=4.0)
    assert not torch.allclose(plain, guided)
    # With the null class in place of a class, guidance changes nothing.
    labels = torch.full((3,), 3)
    embedders = [b.norm1.emb.class_embedder for b in pipe.transformer.transformer_blocks]
    with torch.no_grad():
        for embedder in embedders:
            embedder.embedding_table.weight[:3] = embedder.embedding_table.weight[3]
    assert labels.tolist() == [pipe.num_classes] * 3
    torch.testing.assert_close(
        draw(pipe, guidance_scale=4.0), draw(pipe, guidance_scale=1.0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("num_classes", [1, 10, 1000])
def test_any_number_of_classes(num_classes):
    pipe = tiny_pipeline(num_classes=num_classes)
    assert draw(pipe, (num_classes - 1,)).shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match=f"must be in 0…{num_classes - 1}"):
        draw(pipe, (num_classes,))


def test_latent_models_decode_and_drop_a_learned_variance():
    parts = tiny_dit_pipeline()
    pipe = ClassConditionalPipeline(
        parts.transformer, DDIMScheduler(), vae=parts.vae, prediction_type="epsilon"
    )
    pipe.set_progress_bar_config(disable=True)
    assert draw(pipe).shape == (3, 3, 64, 64)
    assert draw(pipe, output_type="latent").shape == (3, 4, 8, 8)
    assert draw(pipe, output_type="pil")[0].size == (64, 64)


def test_callbacks_see_and_change_the_latents():
    pipe, seen = tiny_pipeline(), []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    images = draw(pipe, callback_on_step_end=callback)
    assert seen == [(i, (3, 1, 8, 8)) for i in range(3)] and (images == 0.5).all()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(), "works on epsilon"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction"), "needs use_flow_sigmas"),
        (DDPMScheduler(variance_type="learned_range"), "works on epsilon"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(scheduler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ()}, "list of class numbers"),
        ({"labels": (0.5,)}, "list of class numbers"),
        ({"labels": (-1,)}, "must be in"),
        ({"guidance_scale": 0.5}, "at least 1"),
        ({"output_type": "jpeg"}, "pil, np, pt or latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callbacks get"),
        ({"latents": torch.zeros(3, 2, 8, 8)}, "latents must be"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_pipeline(), **options)


def test_batches_of_any_size_make_the_same_set():
    pipe = tiny_pipeline()
    labels = class_labels("all", 3, 3)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    options = {"seed": 5, "num_inference_steps": 2, "guidance_scale": 1.5}
    whole = generate(pipe, labels, batch_size=9, **options)
    parts = generate(pipe, labels, batch_size=2, **options)
    assert whole.dtype == np.uint8 and whole.shape == (9, 8, 8, 1)
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert len({image.tobytes() for image in whole}) == 9


def test_a_sample_set_on_disk(tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    config = SampleConfig(
        pipeline=str(tmp_path / "pipe"),
        output_dir=str(tmp_path / "set"),
        classes=[2, 0],
        samples_per_class=2,
        num_inference_steps=2,
    )
    sample(config, dry_run=True)
    assert "would write 4 images of 2 classes" in capsys.readouterr().out
    assert not (tmp_path / "set").exists()
    sample(config)
    with np.load(tmp_path / "set" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (4, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
        assert arrays["labels"].tolist() == [2, 2, 0, 0]
    made = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert made["num_images"] == 4 and made["settings"]["seed"] == 0
    assert made["transformer"]["mhla"]["layout"] == [2, 2]
    written = (tmp_path / "set" / "samples.npz").stat().st_mtime_ns
    sample(config)
    assert "already holds" in capsys.readouterr().out
    assert (tmp_path / "set" / "samples.npz").stat().st_mtime_ns == written
    with pytest.raises(FileExistsError, match="seed: found 0, asked for 1"):
        sample(SampleConfig(**{**config.__dict__, "seed": 1}))


def test_sampling_problems_are_named(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    base = {"pipeline": str(tmp_path / "pipe"), "output_dir": str(tmp_path / "set")}
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        sample(SampleConfig(**base | {"pipeline": str(tmp_path / "none")}))
    with pytest.raises(ValueError, match="found 7 in classes"):
        sample(SampleConfig(**base, classes=[7]))
    with pytest.raises(ValueError, match="no scheduler 'Euler'"):
        sample(SampleConfig(**base, scheduler="Euler"))
    with pytest.raises(ValueError, match="DDPMScheduler needs use_flow_sigmas"):
        sample(SampleConfig(**base, scheduler="DDPMScheduler"))
    sample(SampleConfig(**base, scheduler="UniPCMultistepScheduler", num_inference_steps=2))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="did not write"):
        sample(SampleConfig(**base | {"output_dir": str(tmp_path / "mine")}))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"


def test_a_contact_sheet_holds_every_row_and_group():
    images = np.random.randint(0, 256, (4, 8, 8, 3), np.uint8)
    sheet = contact_sheet({"real": [images, images], "made": [images, images]}, ["a", "b"])
    assert sheet.width > 8 * 48 and sheet.height > 2 * 48
    assert np.asarray(sheet).std() > 10
