"""Converted models inside the tools that users of diffusers already have."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import DiTPipeline, WanPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from tiny import (
    disturb,
    dit_inputs,
    tiny_dit,
    tiny_dit_pipeline,
    tiny_wan,
    tiny_wan_pipeline,
    wan_inputs,
)

import mhla_gen
from mhla_gen import (
    LinformerConfig,
    MHLAConfig,
    MHLADiTTransformer2DModel,
    MHLAWanTransformer3DModel,
)

OPTIONS = {"layers": "2/3", "output_norm": True, "exact": 0.4, "exact_top": 1}
WAN = MHLAConfig(layout=(1, 2, 2), exact_tile=(1, 2, 2), exact_window=(1, 1, 1), **OPTIONS)
DIT = MHLAConfig(layout=(2, 2), exact_tile=(2, 2), exact_window=(1, 1), **OPTIONS)


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample


def sample_dit(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe([1, 2], num_inference_steps=2, generator=generator, output_type="np").images


def sample_wan(pipe):
    embeds = torch.linspace(-1, 1, 2 * 7 * 16).reshape(2, 7, 16)
    return pipe(
        prompt_embeds=embeds[:1],
        negative_prompt_embeds=embeds[1:],
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames


def test_dit_pipeline_round_trip(tmp_path):
    pipe = tiny_dit_pipeline()
    before = sample_dit(pipe)
    assert mhla_gen.inject(pipe, DIT) is pipe
    disturb(pipe.transformer)
    images = sample_dit(pipe)
    assert (images != before).any()
    pipe.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is MHLADiTTransformer2DModel
    assert (sample_dit(loaded) == images).all()
    assert (sample_dit(mhla_gen.restore(loaded)) == before).all()
    loaded.save_pretrained(tmp_path / "restored")
    assert (sample_dit(DiTPipeline.from_pretrained(tmp_path / "restored")) == before).all()


@pytest.mark.parametrize("two_experts", [False, True])
def test_wan_pipeline_round_trip(tmp_path, two_experts):
    pipe = tiny_wan_pipeline(two_experts)
    before = sample_wan(pipe)
    mhla_gen.inject(pipe, WAN)
    for transformer in filter(None, (pipe.transformer, pipe.transformer_2)):
        assert type(disturb(transformer)) is MHLAWanTransformer3DModel
    assert len(mhla_gen.summary(pipe)) == (6 if two_experts else 3)
    frames = sample_wan(pipe)
    assert (frames != before).any()
    pipe.save_pretrained(tmp_path)
    missing = {} if two_experts else {"transformer_2": None}
    loaded = WanPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None, **missing)
    assert (sample_wan(loaded) == frames).all()
    assert (sample_wan(mhla_gen.restore(loaded)) == before).all()


def test_a_pipeline_with_nothing_to_convert_is_named():
    pipe = tiny_dit_pipeline()
    pipe.transformer = None
    with pytest.raises(ValueError, match=r"DiTPipeline has no model .* none of .*DiTTransformer"):
        mhla_gen.inject(pipe)


@pytest.mark.parametrize(
    ("make", "make_inputs", "config"), [(tiny_wan, wan_inputs, WAN), (tiny_dit, dit_inputs, DIT)]
)
def test_lora_trains_beside_mhla_and_round_trips(tmp_path, make, make_inputs, config):
    pristine, inputs = make(), make_inputs()
    model = mhla_gen.inject(copy.deepcopy(pristine), config)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], modules_to_save=["mhla"]))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any(".mhla." in n for n in trainable) and any("lora_A" in n for n in trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(**inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = run(model, inputs)
    model.save_lora_adapter(tmp_path)
    fresh = mhla_gen.inject(pristine, config)
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(fresh, inputs), trained)


def test_a_model_with_lora_adapters_converts():
    model, inputs = tiny_wan(), wan_inputs()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    before = run(model, inputs)
    mhla_gen.inject(model, WAN)
    with_lora = run(model, inputs)
    model.disable_adapters()
    assert not torch.equal(run(model, inputs), with_lora)
    model.enable_adapters()
    assert torch.equal(run(mhla_gen.restore(model), inputs), before)


@pytest.mark.parametrize(
    ("make", "make_inputs", "config"), [(tiny_wan, wan_inputs, WAN), (tiny_dit, dit_inputs, DIT)]
)
def test_ema_saves_and_loads_the_class(tmp_path, make, make_inputs, config):
    model, inputs = mhla_gen.inject(make(), config), make_inputs()
    ema = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    disturb(model)
    ema.step(model.parameters())
    ema.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    ema.copy_to(model.parameters())
    assert torch.equal(run(loaded, inputs), run(model, inputs))


@pytest.mark.parametrize(
    ("make", "make_inputs", "config"), [(tiny_wan, wan_inputs, WAN), (tiny_dit, dit_inputs, DIT)]
)
def test_fp8_layerwise_casting_leaves_mhla_alone(make, make_inputs, config):
    model, inputs = disturb(mhla_gen.inject(make(), config)), make_inputs()
    expected = run(model, inputs)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    dtypes = {p.dtype for n, p in model.named_parameters() if ".mhla." in n}
    assert dtypes == {torch.float32}
    assert torch.float8_e4m3fn in {p.dtype for p in model.parameters()}
    assert (run(model, inputs) - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(offload_type):
    model, inputs = disturb(mhla_gen.inject(tiny_wan(), WAN)), wan_inputs()
    expected = run(model, inputs)
    options = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        **options,
    )
    # One by one, projections round otherwise than in one product.
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)


# Every module that has weights of its own, by kind of attention.
OFFLOADED = {
    "gate": WAN,
    "features": replace(WAN, learned_features=True, gate="head"),
    "focused": replace(WAN, feature_map="focused", gate=3),
    "linformer": LinformerConfig(projected_len=8, sharing="none"),
    "linformer by axis": LinformerConfig(projected_len=(1, 2, 2), sharing="key_value"),
    "linformer of one layer": LinformerConfig(projected_len=8, sharing="layerwise"),
    "linformer by window": LinformerConfig(projected_len=(1, 2, 2), projection="conv"),
    "causal": MHLAConfig(layout=(2, 1, 2), causal_frames=1, output_norm=True),
}


@pytest.mark.parametrize("kind", OFFLOADED)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_accelerate_offload(tmp_path, where, kind):
    model, inputs = disturb(mhla_gen.inject(tiny_wan(), OFFLOADED[kind])), wan_inputs()
    expected = run(model, inputs)
    device = torch.device("cpu")
    if where == "cpu":
        cpu_offload(model, execution_device=device)
    else:
        disk_offload(model, str(tmp_path), execution_device=device)
    assert all(p.is_meta for p in model.blocks[1].attn1.mhla.parameters())
    # One by one, projections round otherwise than in one product.
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)


def test_loading_with_a_device_map(tmp_path):
    model, inputs = disturb(mhla_gen.inject(tiny_wan(), WAN)), wan_inputs()
    model.save_pretrained(tmp_path)
    loaded = MHLAWanTransformer3DModel.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(run(loaded, inputs), run(model, inputs))
