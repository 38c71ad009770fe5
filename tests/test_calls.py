"""How families' transformers are called: the arguments that diffusers' own pipelines hand over."""

import inspect

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from families import FAMILIES
from tiny import tiny_wan_autoencoder
from tiny_autoencoders import (
    autoencoder,
    autoencoder_of_cogvideox,
    autoencoder_of_flux2,
    autoencoder_of_hunyuan,
    autoencoder_of_hunyuan15,
    autoencoder_of_ltx,
    autoencoder_of_mochi,
    autoencoder_of_qwen,
    autoencoder_of_sana,
    shifted,
)
from tiny_calls import CALLED, autoencoder_of, called

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.calls import CALLS, call_class
from mhla_gen.data.autoencoder import encode, latent_normalisation, latent_shape
from mhla_gen.training.transformer_conditions import TransformerConditions


class Recorded(Exception):
    """A pipeline has called its transformer."""


def recorded(pipe, arguments):
    """What a pipeline hands to its transformer in its first step."""
    transformer, found = pipe.transformer, {}
    signature = inspect.signature(transformer.forward)

    def stop(*args, **kwargs):
        found.update(signature.bind(*args, **kwargs).arguments)
        raise Recorded

    transformer.forward = stop
    try:
        with pytest.raises(Recorded):
            pipe(**arguments)
    finally:
        del transformer.forward
    found.update(found.pop("kwargs", {}))
    return found


def assembled(name, **changes):
    model, kind, data = called(name, **changes)
    made, settings = kind.scheduler
    return kind(kind.assemble(model, scheduler=made(**settings), **autoencoder_of(name))), data


def alike(found, expected):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, check_dtype=False)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            alike(ours, theirs)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            alike(found[key], expected[key])
    else:
        assert found == expected


@pytest.mark.parametrize("name", CALLED)
def test_sizes_of_samples_and_of_latents_belong_together(name):
    call, _ = assembled(name)
    for sides in ((2, 3, 4), (5, 6, 2), (1, 1, 7)):
        latents = torch.empty(1, 1, *sides[-call.rank :], device="meta")
        assert call.latent_sizes(call.sizes(latents)) == sides[-call.rank :]


DRAWN = [name for name in CALLED if name not in ("ltx2", "wan_animate", "cosmos")]
# Theirs alone, and not needed: what is the default of `forward`, or says nothing.
NOTHING = {"joint_attention_kwargs", "attention_kwargs", "control_hidden_states_scale"}
# The first times of these schedules are no round numbers.
OWN_TIMES = {"pixart", "hunyuan_dit", "cogvideox", "wan", "skyreels_v2", "wan_vace", "sana_video"}


@pytest.mark.parametrize("name", DRAWN)
def test_arguments_are_those_of_the_pipeline(name):
    call, data = assembled(name)
    row = {key: value[1:2] for key, value in data.batch.items()}
    text = {key: row[key] for key in data.empty_prompt}
    sizes = call.sizes(row["samples"])
    names = ("height", "width") if call.rank == 2 else ("num_frames", "height", "width")
    if call.takes("frames"):
        names = ("frames", "height", "width")
    options = {
        "num_inference_steps": 4,
        "guidance_scale": float(name != "z_image"),
        "use_resolution_binning": False,
    }
    options = {key: value for key, value in options.items() if call.takes(key)}
    latents = call.pack(row["samples"])
    if name == "hunyuan_video15":
        latents = row["samples"]
        call.pipe.guider.disable()
    if name == "z_image":
        latents = row["samples"]
    arguments = {**call.texts(text), **dict(zip(names, sizes, strict=True)), "latents": latents}
    if name == "flux2":
        arguments["latents"] = row["samples"]
    theirs = recorded(call.pipe, arguments | options)
    scale = {"flux": 1000, "flux2": 1000, "qwen_image": 1000}.get(name, 1)
    times = theirs.get("timestep", theirs.get("t")).float() * scale
    if name == "mochi":
        times = 1000 - times
    if name == "z_image":
        times = 1000 - 1000 * times
    if name not in OWN_TIMES:
        assert times == pytest.approx(1000)
    call._guidance = 1.0 if "guidance" in theirs else None
    ours = call.arguments(row["samples"], times, text)
    theirs = {key: value for key, value in theirs.items() if value is not None}
    for key in NOTHING | {"return_dict"}:
        theirs.pop(key, None)
        ours.pop(key, None)
    noise = {"hidden_states", "x"} & theirs.keys()
    assert len(noise) == 1
    alike({k: v for k, v in ours.items() if v is not None}, theirs)


@pytest.mark.parametrize("name", CALLED)
def test_a_model_is_called_before_and_after_conversion(name):
    call, data = assembled(name)
    model, batch = call.pipe.transformer, data.read([0, 1])
    times, dropped = torch.tensor([300.0, 700.0]), torch.tensor([True, False])
    captions = TransformerConditions(call, data.empty_prompt)
    for _ in range(2):
        found = captions.predict(model, batch["samples"], times, batch, dropped)
        assert found.shape == batch["samples"].shape and found.isfinite().all()
        if not isinstance(model, mhla_gen.models.transformer.MHLATransformerMixin):
            mhla_gen.inject(model, MHLAConfig(layout=FAMILIES[name][3]))


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "sd3"])
def test_a_caption_that_is_dropped_is_the_empty_one(name):
    call, data = assembled(name)
    model, batch = call.pipe.transformer, data.read([0, 1])
    times = torch.tensor([300.0, 700.0])
    # The empty caption is shorter than the others.
    empty = {
        key: value[:2] if value.ndim == 2 else value for key, value in data.empty_prompt.items()
    }
    empty = {key: value[:2] if "mask" in key else value for key, value in empty.items()}
    if "prompt_embeds_mask" in empty:
        empty["prompt_embeds_mask"] = torch.ones(2, dtype=torch.int64)
    if name == "sd3":
        empty = data.empty_prompt
    captions = TransformerConditions(call, empty)
    found = captions.predict(model, batch["samples"], times, batch, torch.tensor([True, False]))
    own = batch | {key: value[None].repeat_interleave(2, 0) for key, value in empty.items()}
    alone = captions.predict(model, batch["samples"], times, own, torch.tensor([False, False]))
    torch.testing.assert_close(found[0], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1], alone[1], atol=1e-4)


DECODED = {
    "flux": shifted,
    "flux2": autoencoder_of_flux2,
    "hunyuan_dit": autoencoder,
    "pixart": autoencoder,
    "qwen_image": autoencoder_of_qwen,
    "sana": autoencoder_of_sana,
    "sd3": shifted,
    "z_image": shifted,
    "cogvideox": autoencoder_of_cogvideox,
    "hunyuan_video": autoencoder_of_hunyuan,
    "hunyuan_video15": autoencoder_of_hunyuan15,
    "kandinsky5": autoencoder_of_hunyuan,
    "ltx": autoencoder_of_ltx,
    # Its pipeline decodes latents of 12 channels and no others.
    "mochi": lambda: autoencoder_of_mochi(12),
    "skyreels_v2": tiny_wan_autoencoder,
    "wan": tiny_wan_autoencoder,
}
SMALL = {"hunyuan_video15": (9, 64, 96), "sana": (64, 96), "ltx": (9, 64, 96), "mochi": (7, 32, 48)}


class Seen(Exception):
    """An autoencoder has been asked to decode."""


@pytest.mark.parametrize("name", DECODED)
def test_latents_are_those_that_the_pipeline_decodes(name):
    torch.manual_seed(0)
    vae = DECODED[name]()
    model, kind, data = called(name, **({"in_channels": 12} if name == "mochi" else {}))
    made, settings = kind.scheduler
    call = kind(kind.assemble(model, scheduler=made(**settings), vae=vae))
    sizes = SMALL.get(name, (32, 48) if call.rank == 2 else (9, 32, 48))
    mean, std = encode(vae, torch.rand(1, 3, *sizes) * 2 - 1)
    frames = sizes[0] if call.rank == 3 else 1
    assert mean.shape[1:] == latent_shape(vae, frames, *sizes[-2:])
    assert call.sizes(mean) == sizes
    latents, _ = latent_normalisation(vae).apply(mean, std)
    # It denoises nothing, and decodes what it was given.
    call.pipe.scheduler.step = lambda _, __, sample, *rest, **more: (sample, sample)
    nothing = Transformer2DModelOutput(sample=torch.zeros(1, 2, 1, 1, 1))
    model.forward = lambda *args, **kwargs: nothing
    if name == "hunyuan_video15":
        call.pipe.guider.disable()
    seen = []

    def decode(given, *args, **kwargs):
        seen.append(given)
        raise Seen

    vae.decode = decode
    plain = ("flux2", "z_image", "hunyuan_video15")
    packed = latents if name in plain else call.pack(latents)
    if name == "kandinsky5":
        packed = latents.movedim(1, -1)
    text = {key: value[1:2] for key, value in data.batch.items() if key in data.empty_prompt}
    names = ("height", "width") if call.rank == 2 else ("num_frames", "height", "width")
    options = {"num_inference_steps": 2, "guidance_scale": float(name != "z_image")}
    options |= {"use_resolution_binning": False, "output_type": "np"}
    options |= dict(zip(names, sizes, strict=True))
    with pytest.raises(Seen):
        call.pipe(
            **call.texts(text),
            latents=packed,
            **{key: value for key, value in options.items() if call.takes(key)},
        )
    expected = mean
    if name == "flux2":
        expected = call.pipe._unpatchify_latents(mean)
    torch.testing.assert_close(seen[0].view_as(expected), expected, rtol=1e-4, atol=1e-4)


def test_packing_is_undone():
    for name in CALLED:
        call, data = assembled(name)
        if name in ("z_image", "hunyuan_video15", "kandinsky5"):
            continue
        samples = data.batch["samples"]
        torch.testing.assert_close(call.unpack(call.pack(samples), samples), samples)


def test_every_family_has_a_call():
    missing = [
        base.__name__
        for base in mhla_gen.models.families.MHLA_CLASSES
        if not issubclass(base, DiTTransformer2DModel) and call_class(base) not in CALLS
    ]
    assert not missing
    with pytest.raises(ValueError, match="calls of a Linear are not supported"):
        call_class(torch.nn.Linear(1, 1))
