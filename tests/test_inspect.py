"""`mhla-gen inspect`: the weights it shows are those that the layers apply."""

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from tiny import (
    disturb,
    dit_inputs,
    tiny_dit,
    tiny_dit_pipeline,
    tiny_wan,
    tiny_wan22_autoencoder,
    tiny_wan_pipeline,
    wan_inputs,
)

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.cli import main
from mhla_gen.config import DataConfig, InspectConfig, ModelConfig, TrainConfig
from mhla_gen.inspection import inspect, watch
from mhla_gen.inspection.figures import mark_layers
from mhla_gen.inspection.inputs import add_noise
from mhla_gen.inspection.mixing_figures import on_block_grid
from mhla_gen.inspection.statistics import (
    effective_rank,
    head_statistics,
    numerical_rank,
    row_entropy,
    singular_values,
)
from mhla_gen.inspection.subject import family_of, load_subject
from mhla_gen.ops import locality_mixing
from mhla_gen.training import train

PLAIN = {"conv": False, "gate": False}
CASES = {
    "dit": (tiny_dit, lambda: dit_inputs(batch=1), (2, 2)),
    "wan": (tiny_wan, wan_inputs, (1, 2, 3)),
    "wan on fewer frames than blocks": (tiny_wan, lambda: wan_inputs(frames=1), (2, 2, 3)),
}


def double(inputs):
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def look(model, inputs):
    """What `watch` sees of every layer, beside the layer's value and what it hands on."""
    seen, values, outputs = {}, {}, {}
    layers = [layer for _, layer in family_of(model).attentions(model)]
    hooks = []
    for i, layer in enumerate(layers):
        hooks.append(layer.to_v.register_forward_hook(lambda *a, i=i: values.update({i: a[-1]})))
        hooks.append(
            layer.to_out[0].register_forward_pre_hook(lambda _, a, i=i: outputs.update({i: a[0]}))
        )
    missing = watch(
        family_of(model), model, inputs, lambda i, attention: seen.update({i: attention})
    )
    for hook in hooks:
        hook.remove()
    assert missing == [] and list(seen) == list(range(len(layers)))
    return seen, values, outputs


def all_weights(attention):
    rows = torch.arange(attention.seq_len)
    return torch.stack([attention.weights(rows, head) for head in range(attention.num_heads)])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False, "feature_map": "elu+1"},
        {"mixing_per_head": True, "layers": "2/3"},
        {"exact": 1.0},
        {"exact": 0.3, "linear": False},
        {"exact": 0.3, "learned_features": True},
    ],
)
def test_weights_times_values_are_the_output_of_the_layer(case, options):
    make, make_inputs, layout = CASES[case]
    if options.get("exact") == 0.3:
        ones = (1,) * len(layout)
        options = options | {"exact_tile": tuple(2 * n for n in ones), "exact_window": ones}
        options["exact_top"] = 2
    model = mhla_gen.inject(make(), MHLAConfig(layout=layout, **PLAIN, **options))
    seen, values, outputs = look(disturb(model).double(), double(make_inputs()))
    for index, attention in seen.items():
        value = values[index][0].unflatten(1, (attention.num_heads, -1))
        out = torch.einsum("hqk,khv->qhv", all_weights(attention), value).flatten(1)
        torch.testing.assert_close(out, outputs[index][0].double(), rtol=1e-6, atol=1e-9)
    kinds = {attention.kind for attention in seen.values()}
    expected = {row.kind for row in mhla_gen.summary(model)}
    assert kinds == expected


def test_rows_of_normalised_layers_sum_to_one():
    model = disturb(mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2), layers="2/3"))).double()
    for attention in look(model, double(dit_inputs(batch=1)))[0].values():
        sums = all_weights(attention).sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-4, atol=0)


def test_one_block_is_linear_attention():
    model = mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(1, 1))).double()
    for attention in look(model, double(dit_inputs(batch=1)))[0].values():
        phi_q, phi_k = ((x.relu() + 1e-6).transpose(0, 1) for x in (attention.query, attention.key))
        scores = phi_q @ phi_k.transpose(1, 2)
        expected = scores / (scores.sum(dim=-1, keepdim=True) + 1e-6)
        torch.testing.assert_close(all_weights(attention), expected)
        assert attention.kind == "linear" and attention.rank_bound == attention.head_dim


def test_softmax_weights_are_the_softmax_of_projections():
    model, inputs = tiny_dit().double(), double(dit_inputs(batch=1))
    hidden = {}
    layer = model.transformer_blocks[1].attn1
    layer.to_q.register_forward_pre_hook(lambda _, args: hidden.update(x=args[0]))
    attention = look(model, inputs)[0][1]
    query, key = (
        project(hidden["x"])[0].unflatten(1, (2, 8)).transpose(0, 1)
        for project in (layer.to_q, layer.to_k)
    )
    expected = (query @ key.transpose(1, 2) / math.sqrt(8)).softmax(dim=-1)
    torch.testing.assert_close(all_weights(attention), expected)


def test_watching_leaves_no_hooks_behind():
    model, inputs = mhla_gen.inject(tiny_dit(), MHLAConfig(layout=(2, 2), layers=[1])), dit_inputs()
    with torch.no_grad():
        before = model(**inputs).sample
    with pytest.raises(ValueError, match="batch of 2"):
        watch(family_of(model), model, inputs, lambda *_: None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, before)


def test_entropy_and_ranks_of_known_matrices():
    uniform = torch.full((5, 40), 1 / 40, dtype=torch.float64)
    torch.testing.assert_close(row_entropy(uniform), torch.full((5,), math.log(40)).double())
    assert row_entropy(torch.eye(7)).abs().max() == 0
    assert row_entropy(-3 * uniform)[0].item() == pytest.approx(math.log(40))
    for matrix, rank in ((torch.eye(6, 9), 6), (torch.ones(6, 9), 1)):
        values = singular_values(matrix.double())
        assert numerical_rank(values, (6, 9)) == rank
        assert effective_rank(values) == pytest.approx(rank)
    wide, tall = torch.randn(6, 30).double(), torch.randn(30, 6).double()
    for matrix in (wide, tall):
        torch.testing.assert_close(singular_values(matrix), torch.linalg.svdvals(matrix))


def test_linear_attention_has_at_most_the_rank_of_a_head_and_mhla_more():
    ranks = {}
    for layout in ((1, 1), (4, 4)):
        model = mhla_gen.inject(tiny_dit(sample_size=16), MHLAConfig(layout=layout))
        attention = look(model, dit_inputs(side=16, batch=1))[0][0]
        found = [head_statistics(attention, torch.arange(64), h) for h in range(2)]
        assert all(f.effective_rank <= f.rank <= attention.rank_bound for f in found)
        assert all(0 < f.entropy < math.log(64) for f in found)
        ranks[layout] = [f.rank for f in found]
    assert max(ranks[1, 1]) <= 8 < min(ranks[4, 4])


def test_on_block_grid_puts_every_row_at_its_block():
    layout = (2, 3)
    tiles = on_block_grid(locality_mixing(layout).numpy(), layout)
    assert tiles.shape == (1, 2 * 2, 3 * 3)
    for block, row in enumerate(locality_mixing(layout)):
        top, left = 2 * (block // 3), 3 * (block % 3)
        np.testing.assert_array_equal(tiles[0, top : top + 2, left : left + 3], row.reshape(2, 3))
    video = on_block_grid(np.arange(144.0).reshape(12, 12), (2, 2, 3))
    assert video.shape == (2, 2 * 2 * 2, 3 * 3)
    # The second slice, lower left: block 9, whose row is two slices of two rows.
    np.testing.assert_array_equal(video[1, 4:, :3], 9 * 12 + np.arange(12).reshape(4, 3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A softmax model, its conversion, that in a pipeline, and what does not fit them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    model = tiny_dit(num_layers=2, in_channels=1, sample_size=8)
    model.save_pretrained(folder / "softmax")
    mhla_gen.inject(model, MHLAConfig(layout=(2, 2), layers=[1], mixing_per_head=True))
    disturb(model).save_pretrained(folder / "mhla")
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = mhla_gen.ClassConditionalPipeline(model, scheduler, class_names=list("0123456789"))
    pipeline.save_pretrained(folder / "pipeline")
    tiny_wan().save_pretrained(folder / "wan")
    tiny_dit(in_channels=1).save_pretrained(folder / "deep")
    tiny_dit_pipeline().save_pretrained(folder / "latent")
    (folder / "latent" / "vae").rename(folder / "vae")
    (folder / "empty").mkdir()
    return folder


class Page(HTMLParser):
    """Collects what matters, and that tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.images, self.sources, self.ids, self.links, self.open = [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids.add(attributes.get("id"))
        self.links += [attributes["href"]] if "href" in attributes else []
        if tag == "img":
            self.images.append(attributes)
        elif tag == "source":
            self.sources.append(attributes["srcset"])
        elif tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_everything_and_links_to_nothing(folders, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [f"teacher={folders / 'softmax'}", f"output_dir={output}", "num_inputs=2"]
    assert main(["inspect", str(folders / "mhla"), *arguments]) == 0
    text = (output / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and not re.search(r"https?://|<script|<link", text)
    names = {path.stem for path in output.glob("*.png")}
    assert names == {
        "statistics", "mixing_01", "mixing_01_heads", "attention_00", "attention_01",
    }  # fmt: skip
    assert names < page.ids and all(link[1:] in page.ids for link in page.links)
    assert len(page.images) == len(page.sources) == len(names)
    for image in page.images:
        assert len(image["alt"]) > 40
        # Text is as large in all pictures, and stays readable on a narrow screen.
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
        assert int(image["width"]) == pytest.approx(picture.width * 0.6, abs=1)
        least = int(re.fullmatch(r"min-width: (\d+)px", image["style"])[1])
        assert least == pytest.approx(0.75 * int(image["width"]), abs=1)
    embedded = {base64.b64decode(image["src"].split(",")[1]) for image in page.images}
    assert embedded == {path.read_bytes() for path in output.glob("*.png")}
    assert min(Image.open(path).size[1] for path in output.glob("*.png")) > 100

    numbers = json.loads((output / "statistics.json").read_text())
    assert [layer["kind"] for layer in numbers["model"]] == ["softmax", "mhla"]
    assert [layer["kind"] for layer in numbers["teacher"]] == ["softmax", "softmax"]
    # The first layer is the same in both, and sees the same.
    assert numbers["model"][0] == numbers["teacher"][0]
    assert numbers["model"][1] != numbers["teacher"][1]
    assert [len(layer["inputs"]) for layer in numbers["model"]] == [2, 2]

    # The same again is drawn anew and equals itself; other settings are refused.
    assert main(["inspect", str(folders / "mhla"), *arguments]) == 0
    assert json.loads((output / "statistics.json").read_text()) == numbers
    assert main(["inspect", str(folders / "mhla"), f"output_dir={output}"]) == 2
    assert "made with other settings" in capsys.readouterr().err
    for name in ("notes.txt", "screenshot.png"):
        (output / name).write_text("mine")
        assert main(["inspect", str(folders / "mhla"), *arguments]) == 2
        assert f"has other files, such as {name}" in capsys.readouterr().err
        (output / name).unlink()


def test_wan_pages_have_a_column_per_frame(tmp_path):
    model = mhla_gen.inject(tiny_wan(num_layers=1), MHLAConfig(layout=(2, 2, 2)))
    model.save_pretrained(tmp_path / "wan")
    config = InspectConfig(
        model=str(tmp_path / "wan"), output_dir=str(tmp_path / "out"), grid=[7, 4, 6],
        queries=[[3, 1, 2]], num_inputs=1, max_rows=20, head=1,
    )  # fmt: skip
    text = inspect(config).read_text(encoding="utf-8")
    assert "7 × 4 × 6 = 168" in text and "20 queries drawn at random" in text
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {
        "statistics", "mixing_00", "attention_00",
    }  # fmt: skip


@pytest.mark.parametrize("layers", [[0], [7], [0, 1], [3, 5], [*range(28)]])
def test_layers_are_whole_numbers_on_the_axis(layers):
    axes = Figure().subplots()
    axes.plot(layers, layers)
    mark_layers(axes, layers)
    left, right = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    assert ticks and set(ticks) <= set(range(min(layers), max(layers) + 1))


def test_the_size_is_that_of_the_run(tmp_path, capsys):
    run = tmp_path / "run" / "pipeline"
    pipeline = tiny_wan_pipeline()
    pipeline.register_modules(vae=tiny_wan22_autoencoder())  # 16 pixels a latent, not 8
    pipeline.save_pretrained(run)
    scan = ["mhla.layout=[1,2,2]", "timesteps=[500]", f"output_dir={tmp_path / 'scan'}"]
    own = "21 × 30 × 52 = 32760, the model's own size"

    def said(*arguments):
        assert main(["inspect", *arguments, "num_inputs=1", "device=cpu"]) == 0
        return capsys.readouterr().out

    assert own in said(str(run), "--dry-run")
    (run / "sampling.json").write_text('{"fps": 16.0, "num_inference_steps": 2}')
    assert own in said(str(run), "--dry-run")
    size = {"height": 64, "width": 96, "num_frames": 9}
    (run / "sampling.json").write_text(json.dumps(size))
    tokens = "3 × 2 × 3 = 18, the size of its run, 9 frames of 64 × 96 pixels"
    assert tokens in said(str(tmp_path / "run"), f"output_dir={tmp_path / 'page'}")
    assert tokens in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert f"tokens {tokens}, and write" in said("sensitivity", str(run), *scan, "--dry-run")
    assert tokens in said("sensitivity", str(run), *scan)
    facts = json.loads((tmp_path / "scan" / "sensitivity.json").read_text())["facts"]
    assert facts["tokens"] == tokens
    (run / "sampling.json").unlink()
    kept = (tmp_path / "scan" / "config.yaml").read_text()
    other = [*scan, "max_error=0.5", "num_inputs=1", "device=cpu"]
    assert main(["inspect", "sensitivity", str(run), *other]) == 2
    assert "was measured on [3, 2, 3] tokens, but" in capsys.readouterr().err
    assert (tmp_path / "scan" / "config.yaml").read_text() == kept
    (run / "sampling.json").write_text(json.dumps(size))
    asked = said(str(run), "grid=[2,2,2]", "--dry-run")
    assert "2 × 2 × 2 = 8, as grid asks" in asked


@pytest.mark.parametrize(("make", "grid"), [(tiny_dit, None), (tiny_wan, [7, 4, 6])])
def test_pages_show_both_halves_of_a_layer(tmp_path, make, grid):
    layout = (2,) * len(grid or (4, 4))
    tiles = {"exact_tile": layout, "exact_window": (0,) * len(layout), "exact_top": 1}
    config = MHLAConfig(layout=layout, exact=0.3, **tiles)
    mhla_gen.inject(make(num_layers=1), config).save_pretrained(tmp_path / "model")
    folder = tmp_path / "out"
    settings = {"grid": grid} if grid else {}
    page = inspect(
        InspectConfig(
            model=str(tmp_path / "model"), output_dir=str(folder), num_inputs=1, **settings
        )
    )
    text = page.read_text(encoding="utf-8")
    assert "exact + mhla, exact half 98%" in text
    assert "model, exact half, query" in text and "model, mhla half, query" in text
    assert {path.stem for path in folder.glob("*.png")} == {
        "statistics", "mixing_00", "attention_00",
    }  # fmt: skip
    (layer,) = json.loads((folder / "statistics.json").read_text())["model"]
    assert layer["exact_weight"] == pytest.approx(0.98, abs=0.01)


def test_image_to_video_models_get_image_embeddings(tmp_path):
    tiny_wan(num_layers=1, image_dim=20, added_kv_proj_dim=24).save_pretrained(tmp_path / "i2v")
    config = InspectConfig(
        model=str(tmp_path / "i2v"), output_dir=str(tmp_path / "out"), grid=[1, 3, 3], num_inputs=1
    )
    assert "no layer with more than one block" in inspect(config).read_text(encoding="utf-8")


def test_data_enter_with_the_noise_of_the_timestep(folders, tmp_path, capsys):
    config = InspectConfig(
        model=str(folders / "pipeline"), output_dir=str(tmp_path / "out"), data=DataConfig(),
        timesteps=(100, 900), num_inputs=1,
    )  # fmt: skip
    inspect(config, dry_run=True)
    said = capsys.readouterr().out
    assert "digits 0, class" in said and "timestep 100" in said and "timestep 900" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="need a pipeline folder"):
        inspect(replace(config, model=str(folders / "mhla")))
    images, noise = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    flow = add_noise(FlowMatchEulerDiscreteScheduler(), images, noise, 250)
    torch.testing.assert_close(flow, torch.full_like(images, 0.75))
    ddim = DDIMScheduler()
    expected = ddim.alphas_cumprod[250].sqrt() * images
    torch.testing.assert_close(add_noise(ddim, images, noise, 250), expected)


def test_a_run_is_inspected_before_and_after_its_end(tmp_path, capsys):
    model = ModelConfig(
        mhla=MHLAConfig(layout=(2, 2)), num_layers=1, num_attention_heads=1, attention_head_dim=8
    )
    run = tmp_path / "run"
    train(
        TrainConfig(
            output_dir=str(run), model=model, max_steps=2, batch_size=2, checkpoint_every=2,
            mixed_precision="fp32", learning_rate=0.1, warmup_steps=1, ema_decay=0.9,
        )
    )  # fmt: skip
    config = InspectConfig(model=str(run), output_dir=str(tmp_path / "out"))
    inspect(config, dry_run=True)
    assert "pipeline/transformer" in capsys.readouterr().out
    finished = load_subject(str(run), "transformer", torch.float32)
    (run / "pipeline").rename(tmp_path / "kept")
    inspect(config, dry_run=True)
    assert (
        f"{run / 'checkpoint-2' / 'pipeline' / 'transformer'}, MHLADiT" in capsys.readouterr().out
    )
    # The averaged weights, as in the pipeline, and not those of the last step.
    unfinished = load_subject(str(run), "transformer", torch.float32)
    for name, tensor in unfinished.model.state_dict().items():
        assert torch.equal(tensor, finished.model.state_dict()[name]), name
    last = load_file(run / "checkpoint-2" / "model.safetensors")
    assert any(not last[k].equal(v) for k, v in unfinished.model.state_dict().items())
    assert type(unfinished.scheduler) is type(finished.scheduler)
    # Processes that share a model leave no such file.
    (run / "checkpoint-2" / "model.safetensors").unlink()
    shared = load_subject(str(run), "transformer", torch.float32).model.state_dict()
    assert all(torch.equal(v, shared[k]) for k, v in finished.model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "needs a model"),
        ({"model": "nowhere"}, "nowhere: there is no such folder"),
        ({"model": "empty"}, "nor a saved model"),
        ({"component": "transformer_2", "model": "pipeline"}, "has no transformer_2; it has"),
        ({"grid": [4, 6]}, "token grid is square"),
        ({"grid": [2, 4, 4]}, "grid needs 2 entries"),
        ({"queries": [[4, 0]]}, "queries must lie on the token grid"),
        ({"head": 2}, "has heads 0…1"),
        ({"classes": [10]}, "classes 0…9"),
        ({"teacher": "wan"}, "of one family"),
        ({"teacher": "deep"}, "layers: 2 and 3"),
        ({"model": "vae"}, "is a AutoencoderKL"),
        ({"model": "latent", "data": DataConfig()}, "the model takes"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(options, message, folders, tmp_path):
    options = {"model": "mhla", **options}
    for name in ("model", "teacher"):
        if options.get(name):
            options[name] = str(folders / options[name])
    output = tmp_path / "out"
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as error:
        inspect(InspectConfig(output_dir=str(output), **options))
    assert "\n" not in str(error.value) and not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": (1000,)}, "timesteps must be in"),
        ({"queries": [[1.5, 2]]}, "whole numbers"),
        ({"queries": "all"}, "list of positions"),
        ({"grid": [0, 2]}, "whole numbers of at least 1"),
        ({"data": DataConfig(), "classes": [1]}, "have their own classes"),
        ({"max_rows": 1}, "max_rows must be at least 2"),
    ],
)
def test_settings_are_checked_when_they_are_read(options, message):
    with pytest.raises(ValueError, match=message):
        InspectConfig(**options)
