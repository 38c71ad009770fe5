"""The pipeline for any number of classes: guidance, schedulers, sizes, saving."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import hub_utils
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tiny import tiny_dit_pipeline
from tiny_sampling import FLOW, draw, latent_pipeline, tiny_pipeline

import mhla_gen
from mhla_gen import ClassConditionalPipeline
from mhla_gen.pipelines.guidance import Guidance
from mhla_gen.pipelines.noise import noise_of
from mhla_gen.pipelines.schedulers import other_scheduler
from mhla_gen.sampling.contact_sheet import contact_sheet
from mhla_gen.sampling.saved_pipeline import class_conditional


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


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(variance_type="learned_range", clip_sample=False),
        DDPMScheduler(),
        DDIMScheduler(),
        DPMSolverMultistepScheduler(),
        UniPCMultistepScheduler(),
        EulerAncestralDiscreteScheduler(),
    ],
    ids=lambda s: f"{type(s).__name__}-{s.config.get('variance_type')}",
)
def test_noise_schedulers_on_latents_reload_exactly(tmp_path, scheduler):
    pipe = latent_pipeline(scheduler)
    images = draw(pipe)
    assert images.shape == (3, 3, 64, 64)
    assert draw(pipe, output_type="latent").shape == (3, 4, 8, 8)
    assert draw(pipe, output_type="pil")[0].size == (64, 64)
    pipe.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), images)


def test_a_learned_variance_is_used_as_its_scheduler_uses_it():
    pipe = latent_pipeline(DDPMScheduler(variance_type="learned_range", clip_sample=False))
    found = draw(pipe, guidance_scale=1.0, output_type="latent")
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generators])
    scheduler = pipe.scheduler
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            both = pipe.transformer(latents, t.expand(3), torch.tensor([0, 1, 2])).sample
            assert both.shape[1] == 8
            latents = scheduler.step(both, t, latents, generator=generators).prev_sample
    torch.testing.assert_close(found, latents)


def test_it_draws_what_the_pipeline_of_diffusers_draws():
    theirs = tiny_dit_pipeline()
    theirs.set_progress_bar_config(disable=True)
    ours = class_conditional(theirs)
    ours.set_progress_bar_config(disable=True)
    assert ours.num_classes == 1000 and ours.prediction_type == "epsilon"
    for scale in (1.0, 4.0):
        made = theirs(
            [3, 999],
            guidance_scale=scale,
            num_inference_steps=3,
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
            output_type="pt",
        ).images
        torch.testing.assert_close(draw(ours, [3, 999], guidance_scale=scale), made)


def test_an_image_depends_on_its_seed_and_class_not_on_its_batch():
    pipe = tiny_pipeline()
    together = draw(pipe)
    for i in range(3):
        generator = [torch.Generator().manual_seed(i)]
        torch.testing.assert_close(draw(pipe, (i,), generator=generator), together[i : i + 1])
    assert not torch.allclose(draw(pipe, (1, 1, 1))[0], together[0])


@pytest.mark.parametrize("shape", [(3, 1, 5, 7), (2, 4, 8, 8), (4, 3)])
def test_noise_of_many_generators_is_that_of_diffusers(shape):
    def generators():
        return [torch.Generator().manual_seed(i) for i in range(shape[0])]

    device, theirs = torch.device("cpu"), generators()
    noise, source = noise_of(generators(), shape[0], device)
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        with noise:
            own = randn_tensor(shape, generator=source, device=device, dtype=dtype)
            other = torch.randn(4, generator=torch.Generator().manual_seed(9))
        assert torch.equal(own, randn_tensor(shape, generator=theirs, device=device, dtype=dtype))
        assert torch.equal(other, torch.randn(4, generator=torch.Generator().manual_seed(9)))
    one = torch.Generator()
    assert noise_of(one, 1, device)[1] is one and noise_of([one], 3, device)[1] == [one]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_drawing_never_waits_for_the_gpu(kind):
    pipe = tiny_pipeline() if kind == "pixels" else latent_pipeline(DDPMScheduler())
    draw(pipe.to("cuda"))
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = pipe([0, 1, 2], num_inference_steps=3, generator=generators, output_type="pt")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(made.images.cpu(), draw(pipe.to("cpu")), atol=1e-2, rtol=0)


def test_guidance_extrapolates_from_no_class():
    pipe = tiny_pipeline()
    plain, guided = draw(pipe, guidance_scale=1.0), draw(pipe, guidance_scale=4.0)
    assert not torch.allclose(plain, guided)
    # With the null class in place of a class, guidance changes nothing.
    embedders = [b.norm1.emb.class_embedder for b in pipe.transformer.transformer_blocks]
    with torch.no_grad():
        for embedder in embedders:
            embedder.embedding_table.weight[:3] = embedder.embedding_table.weight[3]
    torch.testing.assert_close(
        draw(pipe, guidance_scale=4.0), draw(pipe, guidance_scale=1.0), rtol=1e-4, atol=1e-5
    )


def test_guidance_applies_inside_its_interval_only():
    pipe = tiny_pipeline()
    pipe.scheduler.set_timesteps(3)
    levels = (pipe.scheduler.timesteps / 1000).tolist()
    calls = []
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda x, **rest: calls.append(len(x)) or forward(x, **rest)
    part = draw(pipe, guidance_scale=4.0, guidance_interval=(levels[1] - 0.01, levels[1] + 0.01))
    assert calls == [3, 6, 3]
    nowhere = draw(pipe, guidance_scale=4.0, guidance_interval=(0.0, 0.0))
    assert torch.equal(nowhere, draw(pipe, guidance_scale=1.0))
    everywhere = draw(pipe, guidance_scale=4.0, guidance_interval=(0.0, 1.0))
    assert torch.equal(everywhere, draw(pipe, guidance_scale=4.0))
    assert not torch.allclose(part, nowhere) and not torch.allclose(part, everywhere)


def test_guided_channels_are_the_first_ones():
    with_class, without = torch.randn(2, 5, 8, 3, 3)
    # As forward_with_cfg of the original DiT: three channels guided, the rest with the class.
    guided = Guidance(4.0, channels=3).combine(with_class, without, 4)
    expected = without[:, :3] + 4.0 * (with_class[:, :3] - without[:, :3])
    assert torch.equal(guided[:, :3], expected) and torch.equal(guided[:, 3:], with_class[:, 3:])
    # All latent channels, but never a learned variance.
    guided = Guidance(4.0).combine(with_class, without, 4)
    assert torch.equal(guided[:, 4:], with_class[:, 4:])
    assert not torch.equal(guided[:, 3], with_class[:, 3])
    pipe = latent_pipeline(DDIMScheduler())
    three = draw(pipe, guidance_scale=4.0, guidance_channels=3, output_type="latent")
    assert not torch.allclose(three, draw(pipe, guidance_scale=4.0, output_type="latent"))


@pytest.mark.parametrize("num_classes", [1, 10, 1000])
def test_any_number_of_classes(num_classes):
    pipe = tiny_pipeline(num_classes=num_classes)
    assert draw(pipe, (num_classes - 1,)).shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match=f"must be in 0…{num_classes - 1}"):
        draw(pipe, (num_classes,))


def test_other_sizes_than_that_of_the_training():
    assert draw(tiny_pipeline(), image_size=12).shape == (3, 1, 12, 12)
    pipe = latent_pipeline(DDIMScheduler())
    assert draw(pipe, image_size=96).shape == (3, 3, 96, 96)
    with pytest.raises(ValueError, match="image_size must be a multiple of 16, found 72"):
        draw(pipe, image_size=72)


def test_callbacks_see_and_change_the_latents():
    pipe, seen = tiny_pipeline(), []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    images = draw(pipe, callback_on_step_end=callback)
    assert seen == [(i, (3, 1, 8, 8)) for i in range(3)] and (images == 0.5).all()


def test_models_come_to_their_device_in_turns():
    pipe = latent_pipeline(DDIMScheduler())
    images = draw(pipe)
    # On a machine without a GPU the hooks are the same, only the device is not another one.
    pipe.enable_model_cpu_offload(device="cuda" if torch.cuda.is_available() else "cpu")
    assert hasattr(pipe.transformer, "_hf_hook") and hasattr(pipe.vae, "_hf_hook")
    torch.testing.assert_close(draw(pipe).cpu(), images)


def test_a_pushed_pipeline_is_the_saved_one(tmp_path, monkeypatch):
    pipe, pushed = tiny_pipeline(class_names=["a", "b", "c"]), tmp_path / "pushed"

    class Repository:
        repo_id = "someone/digits"

    def upload_folder(*, repo_id, folder_path, **rest):
        # What would go over the network.
        import shutil

        assert repo_id == "someone/digits"
        shutil.copytree(folder_path, pushed)
        return "url"

    monkeypatch.setattr(hub_utils, "create_repo", lambda *args, **rest: Repository)
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    monkeypatch.setattr(hub_utils.ModelCard, "load", _no_card)
    assert pipe.push_to_hub("someone/digits") == "url"
    loaded = ClassConditionalPipeline.from_pretrained(pushed)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), draw(pipe)) and loaded.class_names == ["a", "b", "c"]
    assert (pushed / "README.md").is_file()


def _no_card(*args, **rest):
    from huggingface_hub.errors import EntryNotFoundError

    raise EntryNotFoundError("there is no card yet")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(), "cannot take flow_prediction"),
        (UniPCMultistepScheduler(prediction_type="flow_prediction"), "and use_flow_sigmas=True"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), 'needs prediction_type="flow_pred'),
        (DDPMScheduler(variance_type="learned_range"), "cannot take flow_prediction"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(scheduler)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler, "DDIMScheduler cannot take flow_prediction"),
        (EulerDiscreteScheduler, "EulerDiscreteScheduler cannot take flow_prediction"),
        (DPMSolverMultistepScheduler, "needs prediction_type=.* and use_flow_sigmas=True"),
        (UniPCMultistepScheduler, "needs prediction_type=.* and use_flow_sigmas=True"),
    ],
)
def test_a_scheduler_put_into_a_pipeline_must_fit(scheduler, message):
    pipe = tiny_pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0))
    saved = pipe.scheduler.config
    pipe.scheduler = scheduler.from_config(saved)
    with pytest.raises(ValueError, match=message):
        draw(pipe)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_the_ways_of_the_documents_to_change_a_scheduler_are_one(scheduler):
    pipe = tiny_pipeline(FlowMatchEulerDiscreteScheduler(shift=3.0))
    saved = pipe.scheduler
    pipe.scheduler = other_scheduler(saved, scheduler.__name__, {})
    images = draw(pipe)
    pipe.scheduler = scheduler.from_config(saved.config, **FLOW, flow_shift=3.0)
    assert torch.equal(draw(pipe), images)


def test_a_model_of_noise_takes_no_flow_scheduler_later():
    pipe = latent_pipeline(DDPMScheduler(variance_type="learned_range"))
    saved = pipe.scheduler.config
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(saved)
    with pytest.raises(
        ValueError, match="works on flow_prediction, but the model predicts epsilon"
    ):
        draw(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(saved)
    with pytest.raises(ValueError, match="cannot use it; choose variance_type=None"):
        draw(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(saved, variance_type=None)
    assert draw(pipe, output_type="latent").shape == (3, 4, 8, 8)


def test_a_learned_variance_needs_model_and_scheduler():
    pipe = tiny_pipeline()
    learned = DDPMScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="the model has none"):
        ClassConditionalPipeline(pipe.transformer, learned, prediction_type="epsilon")
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler cannot use it"):
        latent_pipeline(DPMSolverMultistepScheduler(variance_type="learned"))


def test_other_schedulers_keep_what_they_share():
    ddpm = DDPMScheduler(variance_type="learned_range", beta_end=0.03, clip_sample=False)
    options = {"prediction_type": "epsilon", "learned_variance": True}
    ddim = other_scheduler(ddpm, "DDIMScheduler", {}, **options)
    assert ddim.config.beta_end == 0.03 and not ddim.config.clip_sample
    solver = other_scheduler(ddim, "DPMSolverMultistepScheduler", {"solver_order": 3}, **options)
    assert solver.config.variance_type is None and solver.config.solver_order == 3
    back = other_scheduler(solver, "DDPMScheduler", {}, **options)
    assert back.config.variance_type == "learned_range"
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    unipc = other_scheduler(euler, "UniPCMultistepScheduler", {})
    assert unipc.config.use_flow_sigmas and unipc.config.flow_shift == 3.0
    assert other_scheduler(unipc, None, {"flow_shift": 5.0}).config.flow_shift == 5.0
    with pytest.raises(ValueError, match="no option 'flow_shit'; did you mean 'flow_shift'"):
        other_scheduler(unipc, None, {"flow_shit": 5.0})
    with pytest.raises(ValueError, match="did you mean 'UniPCMultistepScheduler'"):
        other_scheduler(unipc, "UniPcMultistep", {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ()}, "list of class numbers"),
        ({"labels": (0.5,)}, "list of class numbers"),
        ({"labels": (-1,)}, "must be in"),
        ({"labels": (3,)}, "must be in 0…2, found 3…3"),
        ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, "list of class numbers"),
        ({"labels": ("4",)}, "no class '4'"),
        ({"generator": [torch.Generator()] * 2}, "one per image, found 2 for 3 images"),
        ({"generator": [torch.Generator()]}, "one per image, found 1 for 3 images"),
        ({"guidance_scale": 0.5}, "at least 1"),
        ({"guidance_interval": (0.6, 0.4)}, "the lower one first"),
        ({"guidance_interval": (0.0, 1.5)}, r"noise levels in \[0, 1\]"),
        ({"guidance_channels": 0}, "guidance_channels must be at least 1"),
        ({"guidance_channels": 2}, "guidance_channels must be at most 1, .* found 2"),
        ({"output_type": "jpeg"}, "pil, np, pt or latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "must be among latents, found noise"),
        ({"latents": torch.zeros(3, 2, 8, 8)}, "latents must be"),
        ({"latents": torch.zeros(3, 1, 7, 8)}, r"must be \[3, 1, 8, 8\], found \[3, 1, 7, 8\]"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_pipeline(), **options)


def test_a_contact_sheet_holds_every_row_and_group():
    """Tiles are found by flat colours; then pictures have to be where the colours were."""
    colours = np.arange(1, 17, dtype=np.uint8).reshape(2, 2, 4) * 15
    flat = np.zeros((2, 2, 4, 8, 8, 3), np.uint8)
    flat[..., 0] = colours[..., None, None]
    noise = np.random.default_rng(0).integers(0, 256, flat.shape, np.uint8)

    def sheet(images):
        # [groups, rows, columns, height, width, channels]
        groups = {title: list(rows) for title, rows in zip(("real", "made"), images, strict=True)}
        return np.asarray(contact_sheet(groups, ["a", "b"])).astype(int)

    of_colours, of_noise = sheet(flat), sheet(noise)
    corners = np.zeros((2, 2, 4, 2), int)
    for index in np.ndindex(colours.shape):
        found = np.argwhere((of_colours == (colours[index], 0, 0)).all(-1))
        top, left = corners[index] = found.min(0)
        assert len(found) == 48 * 48 and (found.max(0) - found.min(0) == 47).all()
        tile = Image.fromarray(noise[index]).resize((48, 48), Image.Resampling.BICUBIC)
        assert (of_noise[top : top + 48, left : left + 48] == np.asarray(tile)).all()
    tops, lefts = corners[..., 0], corners[..., 1]
    # A row's tiles are at one height, a column's below each other, groups side by side.
    assert (tops == tops[:1, :, :1]).all() and (lefts == lefts[:, :1]).all()
    assert (np.diff(tops, axis=1) > 48).all() and (np.diff(lefts, axis=2) > 48).all()
    assert (lefts[1].min() - lefts[0].max()) > 48


def test_wide_pictures_are_scaled_down():
    wide = np.random.default_rng(0).integers(0, 256, (2, 300, 500, 3), np.uint8)
    sheet = contact_sheet({"frames": [wide]}, ["a"], tile_size=100)
    assert 200 < sheet.width < 300 and 60 < sheet.height < 120


@pytest.mark.parametrize(
    "make",
    [
        tiny_pipeline,
        lambda: latent_pipeline(DDIMScheduler()),
        lambda: class_conditional(tiny_dit_pipeline()),
    ],
    ids=["pixels", "latents", "diffusers"],
)
def test_a_pipeline_is_made_of_another_ones_parts(make, tmp_path):
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(class_names=[f"c{i}" for i in range(pipe.num_classes)])
    images = draw(pipe)
    taken = ClassConditionalPipeline.from_pipe(pipe)
    made = ClassConditionalPipeline(**pipe.components)
    assert taken.class_names == pipe.class_names
    for new in (taken, made):
        new.set_progress_bar_config(disable=True)
        assert new.transformer is pipe.transformer and new.vae is pipe.vae
        assert torch.equal(draw(new), images)
    # What the model predicts is written down, not taken from a later scheduler.
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "model_index.json").read_text())
    assert saved["prediction_type"] == pipe.prediction_type == made.prediction_type


def test_classes_are_numbers_or_names():
    pipe = tiny_pipeline(class_names=["tench, Tinca tinca", "cock", "c2"])
    images = draw(pipe)
    for labels in (["tench", "Cock", 2], ["Tinca tinca", 1, "c2"], torch.arange(3), np.arange(3)):
        assert torch.equal(draw(pipe, labels), images)
    for label in (0, "tench", [0]):
        generator = torch.Generator().manual_seed(0)
        made = pipe(label, num_inference_steps=3, generator=generator, output_type="pt").images
        assert torch.equal(made, draw(pipe, [0]))
    assert pipe.get_label_ids(["cock", "tench"]) == [1, 0] and pipe.get_label_ids("c2") == [2]
    with pytest.raises(ValueError, match="no class 'cook'; did you mean 'cock'"):
        pipe(["cook"])
    assert tiny_pipeline().get_label_ids(["2", "0"]) == [2, 0]


def test_noise_comes_from_generators_or_latents():
    pipe = latent_pipeline(DDIMScheduler())
    images = draw(pipe)
    noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert torch.equal(draw(pipe, generator=None, latents=torch.cat(noise)), images)
    # One generator draws the noise of all images at once.
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    one = draw(pipe, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, draw(pipe, latents=noise)) and not torch.equal(one, images)


def test_every_output_type_is_the_same_images():
    pipe = latent_pipeline(DDIMScheduler())
    images = draw(pipe)
    assert (draw(pipe, output_type="np") == images.movedim(1, -1).numpy()).all()
    pixels = np.stack([np.asarray(image) for image in draw(pipe, output_type="pil")])
    assert (pixels == (images.movedim(1, -1).numpy() * 255).round()).all()
    pipe.vae.eval()
    latents = draw(pipe, output_type="latent") / pipe.vae.config.scaling_factor
    with torch.no_grad():
        decoded = pipe.vae.decode(latents).sample / 2 + 0.5
    torch.testing.assert_close(decoded.clamp(0, 1), images)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    (plain,) = pipe(
        [0, 1, 2], num_inference_steps=3, generator=generators, output_type="pt", return_dict=False
    )
    assert torch.equal(plain, images)


ODD_NAMES = (
    *("two\nlines", "tab\there", "cr\rhere", "nul\0", "$x^$ \\frac", "", "\n", "a" * 5000),
    *("emoji 🐱 山 עברית العربية", "\u200b", "\ud800x", "\u2028x", "caf\udce9", "\x1b[31mred"),
)


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_a_contact_sheet_is_drawn_whatever_a_row_is_called(name):
    image = np.zeros((2, 16, 16, 3), np.uint8)
    sheet = contact_sheet({"samples": [image]}, [name], per_row=2)
    assert sheet.width < 1000 and sheet.height < 100
