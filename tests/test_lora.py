"""Low-rank updates where processes share the model: the same run, the same pipeline."""

from dataclasses import replace

import pytest
import torch
from commands import finish, launch
from test_video import losses_of, wan_run
from tiny import tiny_clip_cache, tiny_wan, wan_inputs

import mhla_gen
from mhla_gen.config import MHLAConfig, WanConfig, save_config
from mhla_gen.config.previews import PreviewConfig
from mhla_gen.sampling.saved_pipeline import load_pipeline
from mhla_gen.training.lora import add_lora, merged
from mhla_gen.training.parallel import without_weights

TILES = {"exact_tile": (1, 2, 2), "exact_window": (1, 1, 1), "exact_top": 1}
EXACT = MHLAConfig(layout=(2, 2, 2), exact=0.3, **TILES)


def with_updates():
    """A tiny Wan with MHLA whose updates have left zero."""
    model = mhla_gen.inject(tiny_wan())
    add_lora(model, WanConfig(lora_rank=2, lora_alpha=3.0))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_a_copy_without_weights_takes_those_of_the_model():
    model = with_updates()
    outline = without_weights(model)
    assert all(p.is_meta for p in outline.parameters())
    assert not any(p.is_meta for p in model.parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outline.load_state_dict(state, assign=True)
    inputs = wan_inputs()
    with torch.no_grad():
        expected = model(**inputs)[0]
        assert outline(**inputs)[0].equal(expected)
        alone = merged(outline)
        assert not any("lora" in name for name in alone.state_dict())
        torch.testing.assert_close(alone(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in outline.named_parameters() if p.requires_grad] == trained


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny_clip_cache(tmp_path_factory.mktemp("clips"))


@pytest.mark.slow
def test_shared_models_learn_updates_as_whole_ones_do(cache, tmp_path):
    tiny_wan().save_pretrained(tmp_path / "base")
    whole, shared = (
        wan_run(
            tmp_path / how,
            cache,
            {"lora_rank": 2},
            {"pretrained": str(tmp_path / "base"), "trainable": "lora", "mhla": EXACT},
            learning_rate=1e-2,
            max_steps=4,
            batch_size=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            mixed_precision="bf16",
            checkpoint_every=2,
            sample_every=2,
            samples=PreviewConfig(num_images=2, num_inference_steps=2),
            ema_decay=0.5,
            parallelism=how,
        )
        for how in ("ddp", "fsdp")
    )
    by_two(whole, tmp_path)
    by_two(shared, tmp_path)
    folders = tmp_path / "ddp", tmp_path / "fsdp"
    losses = losses_of(folders[0])
    assert len(losses) == 4 and losses[3] != losses[0]
    assert losses_of(folders[1]) == pytest.approx(losses, rel=1e-5)
    first, second = (saved(folder / "pipeline" / "transformer") for folder in folders)
    assert_close(second, first)
    assert not any("lora" in name for name in second)
    # Updates of every process are in the merged weights: those of one process, from a checkpoint.
    assert_close(
        load_pipeline(str(folders[1] / "checkpoint-4"), torch.float32).transformer.state_dict(),
        second,
    )

    # Killed after step 2, as far as its folder can tell.
    for name in ("checkpoint-4", "pipeline"):
        (folders[1] / name).rename(tmp_path / name)
    by_two(replace(shared, resume="latest"), tmp_path)
    assert losses_of(folders[1]) == pytest.approx(losses, rel=1e-5)
    again = saved(folders[1] / "pipeline" / "transformer")
    assert all(again[name].equal(value) for name, value in second.items())


def by_two(config, folder):
    save_config(config, folder / "run.yaml")
    finish(launch("train", folder / "run.yaml", processes=2))


def saved(folder):
    return mhla_gen.MHLAWanTransformer3DModel.from_pretrained(folder).state_dict()


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5)
