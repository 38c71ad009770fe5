"""Compiled transformers in one process: many sizes, many models, and a whole run of them."""

import functools
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
from tiny import (
    CountsForms,
    dit_inputs,
    tiny_clip_cache,
    tiny_dit,
    tiny_video,
    tiny_wan,
    wan_inputs,
)
from tiny_calls import called
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx
from torch._inductor import config as inductor
from torch._inductor.choices import InductorChoices
from torch._inductor.decomposition import (
    decompositions,
    fast_random_decomps,
    select_decomp_table,
)
from torch._inductor.dependencies import MemoryDep
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.config import ModelConfig, TrainConfig, TransformerConfig, load_config
from mhla_gen.runtime.compiling import compile_blocks, compile_model
from mhla_gen.training import train
from mhla_gen.training.randomness import step_randomness
from mhla_gen.training.training_run import build_run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Forms of one block that torch makes by itself in these tests; it is 8 otherwise.
LIMIT = 3
GRIDS = [(1, 2, 4), (1, 4, 2), (3, 4, 6), (5, 2, 2)]
# Pixels of clips.
SIZES = [(32, 48), (48, 32), (32, 32), (32, 64)]


@pytest.fixture
def forms(monkeypatch):
    """Counts what torch compiles, which it is not asked to generate code for."""
    torch._dynamo.reset()
    counter = CountsForms()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        yield counter


def output(model, inputs):
    return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("family", [pytest.param("dit", marks=pytest.mark.slow), "wan"])
def test_one_model_takes_as_many_sizes_as_data_have(family, forms):
    """Training and sampling, each size by itself: the most that torch could have to compile."""
    if family == "dit":
        model, layout = tiny_dit(num_layers=1), (2, 2)
        batches = [dit_inputs(side, batch) for side in (4, 6) for batch in (1, 2)]
    else:
        model, layout = tiny_wan(num_layers=1), (1, 2, 2)
        batches = [wan_inputs(t, 2 * h, 2 * w) for t, h, w in GRIDS]
    mhla_gen.inject(model, MHLAConfig(layout=layout))
    with torch.no_grad():
        expected = [output(model, batch) for batch in batches]
    compile_blocks(model)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for batch, wanted in zip(batches, expected, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(output(model.eval(), batch), wanted)
        output(model.train(), batches[0]).sum().backward()
    assert forms.frame_count == len(batches) + 1 > LIMIT


@pytest.mark.parametrize("how", ["regional", "whole"])
def test_what_trains_is_compiled_for_its_own_size(how, forms):
    """Whatever was compiled before: previews, and another run, have batches of other sizes."""
    for batch in (2, 3):
        model = tiny_dit(num_layers=1)
        mhla_gen.inject(model, MHLAConfig(layout=(2, 2)))
        compile_model(model, how)
        with torch.no_grad():
            output(model, dit_inputs(4, batch + 2))
        output(model.train(), dit_inputs(4, batch)).sum().backward()
    inputs = [
        node.meta["example_value"]
        for graph in forms.graphs
        for node in graph.graph.find_nodes(op="placeholder")
    ]
    assert len(forms.graphs) == 4
    assert all(type(length) is int for x in inputs for length in x.shape)


def test_lengths_of_captions_are_not_compiled_one_by_one(forms, tmp_path):
    """Qwen-Image pads captions to the longest of a batch only."""
    model, _, data = called("qwen_image")
    data.empty_prompt = {name: x[:1] for name, x in data.empty_prompt.items()}
    sizes = {name: value for name, value in model.config.items() if not name.startswith("_")}
    config = TrainConfig(
        output_dir=str(tmp_path),
        transformer=TransformerConfig(name=type(model).__name__, sizes=sizes | {"num_layers": 1}),
        model=ModelConfig(mhla=MHLAConfig(layout=(2, 2))),
        compile="regional",
        mixed_precision="fp32",
        report_to="none",
        batch_size=4,
    )
    run, whole = build_run(config, data=data), data.batch
    randomness = step_randomness(run.task.objective, seed=0, step=0, batch_size=4)
    for length in range(2, 8):
        cut = {name: x[:, :length] for name, x in whole.items() if name.startswith("prompt")}
        run.task.step_losses(run.model, whole | cut, randomness)["loss"].mean().backward()
    assert forms.frame_count <= 2


def test_models_of_one_process_do_not_count_together(forms):
    """As in a notebook; what torch compiles for one model it keeps for that one."""
    inputs = dit_inputs(4)
    for heads in range(1, LIMIT + 2):
        model = tiny_dit(num_layers=1, num_attention_heads=heads, attention_head_dim=4)
        mhla_gen.inject(model, MHLAConfig(layout=(1, 1)))
        with torch.no_grad():
            expected = output(model, inputs)
            compile_blocks(model)
            torch.testing.assert_close(output(model, inputs), expected)
    assert forms.frame_count == LIMIT + 1


@pytest.mark.slow
def test_a_run_on_clips_of_ten_sizes_samples_and_resumes(forms, tmp_path):
    sizes = [(frames, height, width) for frames in (1, 5, 9) for height, width in SIZES]
    clips = tmp_path / "ten"
    clips.mkdir()
    for number, (frames, height, width) in enumerate(sizes):
        tiny_video(clips / f"{number}.mp4", frames, height, width)
        (clips / f"{number}.txt").write_text("a red square moves right")
    buckets = f"clips.buckets={[list(size) for size in sizes]}"
    cache = tiny_clip_cache(tmp_path / "cache", buckets, f"data.path={clips}")
    settings = [
        f"output_dir={tmp_path / 'run'}",
        f"data.path={cache}",
        "data.source=cache",
        "wan.num_layers=1",
        "wan.num_attention_heads=2",
        "wan.attention_head_dim=12",
        "wan.ffn_dim=32",
        "model.mhla.layout=[1,2,2]",
        "compile=regional",
        "mixed_precision=fp32",
        "report_to=none",
        "batch_size=1",
        "samples.num_images=1",
        "samples.num_inference_steps=2",
        "sample_every=12",
        "checkpoint_every=12",
        "log_every=4",
    ]
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        train(load_config(None, [*settings, "max_steps=12"], TrainConfig))
        first = forms.frame_count
        train(load_config(None, [*settings, "max_steps=24", "resume=latest"], TrainConfig))
    # Every size in training, and that of the previews without gradients; then anew.
    assert first > 10 and forms.frame_count > 2 * 10
    assert (tmp_path / "run" / "pipeline").is_dir()


def test_a_model_that_is_not_compiled_leaves_torchs_settings_alone():
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        compile_model(tiny_dit(num_layers=1), "none")
        assert torch._dynamo.config.optimize_ddp == "python_reducer"


@pytest.mark.parametrize("how", ["regional", "whole"])
def test_buckets_of_gradients_cut_a_whole_model_but_no_block(how, forms, monkeypatch):
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_dit(num_layers=3, dropout=0.0)
        compile_model(model, how)
        shared = DistributedDataParallel(model, bucket_cap_mb=0.001)
        shared(**dit_inputs(), return_dict=False)[0].sum().backward()
        assert (len(forms.graphs) == 1) == (how == "regional")
    finally:
        dist.destroy_process_group()


def test_repeatable_kernels_are_not_chosen_by_timing(monkeypatch):
    """By a setting of each: torch's own does not survive the first one that is compiled."""
    found = []

    def generated(graph, inputs, **_):
        found.append(inductor.deterministic)
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(
        compile_fx, "compile_fx", functools.partial(compile_fx.compile_fx, inner_compile=generated)
    )
    for repeatable in (True, True, False):
        model = tiny_dit(num_layers=1).eval()
        compile_blocks(model, repeatable=repeatable)
        with torch.no_grad():
            output(model, dit_inputs())
    assert found == [True, True, False]


@pytest.mark.parametrize("how", ["regional", "whole"])
def test_sums_over_tokens_have_kernels_of_their_own(how, monkeypatch):
    """Also in backward passes, which torch compiles in another thread, where the GPU's are run."""
    found = []

    def generated(graph, inputs, **_):
        found.append(inductor.triton.mix_order_reduction)
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(
        compile_fx, "compile_fx", functools.partial(compile_fx.compile_fx, inner_compile=generated)
    )
    model = tiny_dit(num_layers=1)
    compile_model(model, how)
    loss = output(model, dit_inputs()).sum()
    forward = len(found)
    thread = Thread(target=loss.backward)
    with inductor.patch({"triton.mix_order_reduction": True}):
        thread.start()
        thread.join()
    assert len(found) > forward > 0
    assert not any(found)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["softmax", "mhla"])
def test_gradients_of_compiled_modulation_are_whole(attention):
    """At a size at which torch could normalise tokens and add them up in one kernel."""
    torch.manual_seed(0)
    model = tiny_wan(num_attention_heads=10, attention_head_dim=64, num_layers=1).to(DEVICE)
    if attention == "mhla":
        mhla_gen.inject(model, MHLAConfig(layout=(2, 2, 3)))
    inputs = {key: x.to(DEVICE) for key, x in wan_inputs(frames=4, height=128, width=64).items()}
    found = []
    for how in ("none", "regional"):
        compile_model(model, how)
        for _ in range(2):
            model.zero_grad()
            output(model, inputs).square().mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    largest = max(gradient.abs().max() for gradient in found[0])
    for (name, _), x, y in zip(model.named_parameters(), *found, strict=True):
        # Sums of thousands of tokens in float32: half its digits.
        torch.testing.assert_close(x / largest, y / largest, rtol=0, atol=3e-4, msg=name)


def test_long_tokens_are_normalised_at_once(forms, monkeypatch):
    """In every thread, since autograd's compile backward passes."""
    ordinary = InductorChoices.should_use_persistent_reduction
    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", staticmethod(ordinary))
    compile_blocks(tiny_dit(num_layers=1))
    chosen: Any = InductorChoices.should_use_persistent_reduction
    compile_blocks(tiny_dit(num_layers=1))
    assert InductorChoices.should_use_persistent_reduction is chosen

    token, channel = sympy.symbols("token channel", integer=True)
    tokens = 4096 * token + channel
    # Modulation of samples of 16 tokens, added to them; sums over tokens; and no plain sizes.
    shared = [tokens, sympy.floor(token / 16) * 4096 + channel]
    across = [4096 * channel + token]
    folded = [sympy.Mod(channel, 3)]

    def holds(hint: ReductionHint, size: int, indices: list[sympy.Expr]) -> bool:
        reads = [MemoryDep("x", x, (token, channel), (32, size)) for x in indices]
        node = SimpleNamespace(read_writes=SimpleNamespace(reads=reads))
        features = SimpleNamespace(
            get_reduction_hint=lambda: hint,
            reduction_numel=sympy.Integer(size),
            reduction_nodes=lambda: [node],
            strict_sum_rblock=lambda: None,
        )
        with V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator())):
            return bool(V.choices.should_use_persistent_reduction(features, False))

    inner, outer, default = ReductionHint.INNER, ReductionHint.OUTER, ReductionHint.DEFAULT
    with ThreadPoolExecutor(1) as thread:
        for run in (
            lambda function, *args: function(*args),
            lambda *args: thread.submit(*args).result(),
        ):
            assert run(holds, inner, 2048, [tokens])
            assert run(holds, default, 2048, shared)
            assert not run(holds, inner, 2049, [tokens])
            assert not run(holds, default, 2049, shared)
            assert not run(holds, outer, 2048, [tokens])
            assert not run(holds, default, 2048, across)
            assert not run(holds, default, 2048, folded)


def test_gradients_of_an_embedding_are_summed_in_a_fixed_order(forms, monkeypatch):
    """By torch's own operator; what replaces it in compiled code adds up by atomic operations."""
    backward = torch.ops.aten.embedding_dense_backward.default
    # As where other code was compiled before.
    monkeypatch.setitem(decompositions, backward, torch._decomp.decomposition_table[backward])
    fast_random_decomps.cache_clear()
    assert backward in select_decomp_table()
    compile_blocks(tiny_dit(num_layers=1))

    def gradient(grad, labels):
        return backward(grad, labels, 5, -1, False)

    given = torch.randn(3, 4), torch.tensor([2, 2, 2])
    graph = make_fx(gradient, decomposition_table=select_decomp_table())(*given)
    assert backward in [node.target for node in graph.graph.nodes]
