"""Adapters: what was added travels alone, fits where it belongs, and goes without a trace."""

import copy
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload
from diffusers import WanPipeline, WanTransformer3DModel
from families import FAMILIES, cast, run
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import disturb, dit_inputs, tiny_dit, tiny_wan, tiny_wan_pipeline, wan_inputs
from tiny_sampling import arrays_of, set_of, tiny_pipeline

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.hub import ADAPTER_NAME
from mhla_gen.models.base_weights import BaseWeights
from mhla_gen.sampling import sample

TARGETS = ["to_q", "to_out.0", "net.2"]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was made for other weights")
        yield


def add_lora(model, name="default"):
    model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS), adapter_name=name)
    for path, parameter in model.named_parameters():
        if f".lora_B.{name}" in path:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def adapted(base, layout, lora=False, **options):
    model = disturb(mhla_gen.inject(copy.deepcopy(base), MHLAConfig(layout=layout, **options)))
    return add_lora(model) if lora else model


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_is_what_was_added(name, tmp_path):
    make, make_inputs, mhla_class, layout = FAMILIES[name]
    base, inputs = make(), make_inputs()
    model = adapted(base, layout, layers="2/3", exact=0.3)
    path = mhla_gen.save_adapter(model, tmp_path)
    assert path == tmp_path / ADAPTER_NAME
    assert len(load_file(path)) == sum(".mhla." in key for key in model.state_dict())
    before, config, state = run(base, inputs), dict(base.config), base.state_dict()
    assert mhla_gen.load_adapter(base, tmp_path) is base
    assert type(base) is mhla_class and base.mhla_config == model.mhla_config
    assert torch.equal(run(base, inputs), run(model, inputs))
    assert mhla_gen.unload_adapter(base) is base
    assert type(base) is make().__class__ and dict(base.config) == config
    assert base.state_dict().keys() == state.keys()
    assert torch.equal(run(base, inputs), before)


def test_lora_travels_with_it_and_others_stay(tmp_path):
    base, inputs = tiny_wan(), wan_inputs()
    model = adapted(base, (1, 2, 3), lora=True)
    mhla_gen.save_adapter(model, tmp_path)
    before = run(base, inputs)
    mhla_gen.load_adapter(base, tmp_path)
    assert torch.equal(run(base, inputs), run(model, inputs))
    assert all(p.requires_grad for p in base.parameters())
    mhla_gen.unload_adapter(base)
    assert torch.equal(run(base, inputs), before)
    assert not any("lora" in key or "base_layer" in key for key in base.state_dict())
    add_lora(base, "own")
    with_own = run(base, inputs)
    mhla_gen.load_adapter(base, tmp_path)
    mhla_gen.unload_adapter(base)
    base.set_adapter("own")
    assert torch.equal(run(base, inputs), with_own)


def test_adapters_are_switched(tmp_path):
    base, inputs = tiny_wan(), wan_inputs()
    first = adapted(base, (1, 2, 3), lora=True)
    second = adapted(base, (1, 5, 2), exact=0.2, layers=[1])
    before = run(base, inputs)
    for number, model in enumerate((first, second)):
        mhla_gen.save_adapter(model, tmp_path / str(number))
    for number, model in ((0, first), (1, second), (0, first)):
        mhla_gen.load_adapter(base, tmp_path / str(number))
        assert torch.equal(run(base, inputs), run(model, inputs))
    mhla_gen.unload_adapter(base)
    assert torch.equal(run(base, inputs), before)
    with pytest.raises(ValueError, match="no adapter to unload"):
        mhla_gen.unload_adapter(base)


def test_pipelines_with_two_experts_save_as_usual(tmp_path):
    base = tiny_wan_pipeline(two_experts=True)
    pipe = copy.deepcopy(base)
    mhla_gen.inject(pipe, MHLAConfig(layout=(1, 2, 3)))
    for model in (pipe.transformer, pipe.transformer_2):
        disturb(model)
    mhla_gen.save_adapter(pipe, tmp_path / "adapter")
    mhla_gen.load_adapter(base, tmp_path / "adapter")
    base.save_pretrained(tmp_path / "pipeline")
    nothing = {"tokenizer": None, "text_encoder": None}
    loaded = WanPipeline.from_pretrained(tmp_path / "pipeline", **nothing)
    inputs = wan_inputs()
    for name in ("transformer", "transformer_2"):
        expected = run(getattr(pipe, name), inputs)
        assert torch.equal(run(getattr(loaded, name), inputs), expected)
    mhla_gen.unload_adapter(base)
    assert type(base.transformer) is type(base.transformer_2) is WanTransformer3DModel
    base.save_pretrained(tmp_path / "softmax")
    index = json.loads((tmp_path / "softmax" / "model_index.json").read_text())
    assert index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    with pytest.raises(ValueError, match="for transformer and transformer_2, but the model has"):
        mhla_gen.load_adapter(tiny_wan(), tmp_path / "adapter")


def test_weights_of_any_size_have_digests():
    # float32 cannot tell the last of 5120 × 5120 values, as in Wan 14B, from the one after it.
    layer = torch.nn.Linear(5120, 5120, bias=False, dtype=torch.bfloat16, device="meta")
    layer = layer.to_empty(device="cpu").requires_grad_(False)
    layer.weight.zero_()
    before = BaseWeights.of(layer).digests
    assert before.keys() == {"weight"} and not BaseWeights.of(layer).different(before)
    layer.weight[-1, -1] = 1
    assert BaseWeights.of(layer).different(before) == ["weight"]


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path):
    mhla_gen.save_adapter(adapted(tiny_wan(), (1, 2, 3), lora=True), tmp_path)
    dit, inputs = tiny_dit(), dit_inputs()
    before = run(dit, inputs)
    with pytest.raises(ValueError, match="for a WanTransformer3DModel, found a DiTTransformer2D"):
        mhla_gen.load_adapter(dit, tmp_path)
    assert torch.equal(run(dit, inputs), before) and not hasattr(dit, "_mhla_adapter")
    for changes, message in (
        ({"num_attention_heads": 4}, "of other sizes"),
        ({"num_layers": 2}, "of other sizes"),
        ({"ffn_dim": 40}, "LoRA for blocks.0.ffn.net.2 with 32 channels"),
    ):
        other = tiny_wan(**changes)
        with pytest.raises(ValueError, match=message):
            mhla_gen.load_adapter(other, tmp_path)
        assert type(other) is WanTransformer3DModel
    own = mhla_gen.inject(tiny_wan(), MHLAConfig(layout=(1, 2, 3)))
    with pytest.raises(ValueError, match="MHLA layers of its own"):
        mhla_gen.load_adapter(own, tmp_path)
    with pytest.raises(ValueError, match="no MHLA layers"):
        mhla_gen.save_adapter(tiny_wan(), tmp_path / "none")
    with pytest.raises(ValueError, match="one LoRA, found default, second"):
        mhla_gen.save_adapter(add_lora(add_lora(own), "second"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_files_that_are_no_adapter_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no mhla_adapter"):
        mhla_gen.load_adapter(tiny_wan(), tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder here, and the hub"):
        mhla_gen.load_adapter(tiny_wan(), "nobody/nothing")
    with pytest.raises(FileNotFoundError, match="cannot be a name on the hub"):
        mhla_gen.load_adapter(tiny_wan(), tmp_path / "nothing")
    save_file({"a": torch.ones(1)}, tmp_path / ADAPTER_NAME)
    with pytest.raises(ValueError, match="no adapter that this version reads"):
        mhla_gen.load_adapter(tiny_wan(), tmp_path)
    (tmp_path / ADAPTER_NAME).write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read"):
        mhla_gen.load_adapter(tiny_wan(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_base_weights_are_told_and_other_dtypes_are_not(dtype, tmp_path):
    base, inputs = tiny_wan(), wan_inputs()
    model = adapted(base, (1, 2, 3))
    mhla_gen.save_adapter(model, tmp_path)
    same = mhla_gen.load_adapter(copy.deepcopy(base).to(dtype), tmp_path)
    assert run(same, cast(inputs, dtype)).isfinite().all()
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.blocks[1].ffn.net[2].bias.add_(0.5)
    with pytest.warns(UserWarning, match=r"1 of \d+ differ, such as blocks.1.ffn.net.2.bias"):
        mhla_gen.load_adapter(other, tmp_path)
    assert not torch.equal(run(other, inputs), run(model, inputs))


@pytest.mark.parametrize("lora", [False, True])
def test_bases_in_shards_and_elsewhere(lora, tmp_path):
    base, inputs = tiny_wan(), wan_inputs()
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    model = adapted(base, (1, 2, 3), lora=lora)
    mhla_gen.save_adapter(model, tmp_path)
    expected = run(model, inputs)
    placed = WanTransformer3DModel.from_pretrained(tmp_path / "base", device_map="cpu")
    torch.testing.assert_close(run(mhla_gen.load_adapter(placed, tmp_path), inputs), expected)
    for offload in (
        lambda model: cpu_offload(model, torch.device("cpu")),
        lambda model: disk_offload(model, tmp_path / "offload", torch.device("cpu")),
    ):
        away = copy.deepcopy(base)
        offload(away)
        softmax = run(away, inputs)
        assert all(p.is_meta for p in away.blocks.parameters())
        if lora:
            with pytest.raises(ValueError, match="before weights are offloaded"):
                mhla_gen.load_adapter(away, tmp_path)
            continue
        mhla_gen.load_adapter(away, tmp_path)
        torch.testing.assert_close(run(away, inputs), expected)
        mhla_gen.save_adapter(away, tmp_path / "again")
        assert (
            load_file(tmp_path / "again" / ADAPTER_NAME).keys()
            == load_file(tmp_path / ADAPTER_NAME).keys()
        )
        mhla_gen.unload_adapter(away)
        assert torch.equal(run(away, inputs), softmax)
        shutil.rmtree(tmp_path / "offload", ignore_errors=True)


@pytest.mark.parametrize("name", ["sd3", "hunyuan_dit"])
def test_models_that_come_to_a_device_as_a_whole(name, tmp_path):
    make, make_inputs, _, layout = FAMILIES[name]
    base, inputs = make(), make_inputs()
    model = adapted(base, layout)
    mhla_gen.save_adapter(model, tmp_path)
    before = run(base, inputs)
    base, _ = cpu_offload_with_hook(base, torch.device("cpu"))
    mhla_gen.load_adapter(base, tmp_path)
    assert torch.equal(run(base, inputs), run(model, inputs))
    mhla_gen.unload_adapter(base)
    assert torch.equal(run(base, inputs), before)


def test_samples_with_an_adapter_are_those_of_the_whole_pipeline(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "whole")
    mhla_gen.save_adapter(pipe, tmp_path / "adapter")
    mhla_gen.restore(pipe).save_pretrained(tmp_path / "base")
    sample(set_of(tmp_path / "a", tmp_path / "whole", num_samples=3))
    adapter = str(tmp_path / "adapter")
    sample(set_of(tmp_path / "b", tmp_path / "base", num_samples=3, adapter=adapter))
    assert np.array_equal(*(arrays_of(tmp_path / part)["arr_0"] for part in "ab"))


def test_groups_are_offloaded_after_loading(tmp_path):
    base, inputs = tiny_wan(), wan_inputs()
    model = adapted(base, (1, 2, 3))
    mhla_gen.save_adapter(model, tmp_path)
    device = torch.device("cpu")
    ours = mhla_gen.load_adapter(copy.deepcopy(base), tmp_path)
    ours.enable_group_offload(device, offload_type="leaf_level")
    torch.testing.assert_close(run(ours, inputs), run(model, inputs))
    base.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(ValueError, match="offloaded by groups; load the adapter before"):
        mhla_gen.load_adapter(base, tmp_path)
