"""A Wan that is causal over frames: chunk by chunk against the whole clip at once."""

import copy
import re

import pytest
import torch
from diffusers import WanPipeline
from tiny import disturb, tiny_dit, tiny_wan, tiny_wan_pipeline, wan_inputs

import mhla_gen
from mhla_gen import ClipState, MHLAConfig
from mhla_gen.errors import UserError
from mhla_gen.models import FrameCausalMHLA
from mhla_gen.runtime.compiling import compile_blocks

FRAMES, CHUNK = 7, 2  # Whole chunks, and one frame more.


def causal_wan(changes=None, **sizes):
    torch.manual_seed(0)
    settings = {"layout": (3, 2, 2), "causal_frames": CHUNK} | (changes or {})
    return disturb(mhla_gen.inject(tiny_wan(**sizes), MHLAConfig(**settings)))


def clip(frames=FRAMES, batch=2, **sizes):
    """Latents and conditions, and a time for every chunk."""
    torch.manual_seed(1)
    inputs = wan_inputs(frames, batch=batch, **sizes)
    times = 1000 * torch.rand(batch, -(-frames // CHUNK))
    return inputs["hidden_states"], inputs["encoder_hidden_states"], times


def times_of_tokens(times, latents):
    per_chunk = CHUNK * latents.shape[3] * latents.shape[4] // 4
    tokens = latents.shape[2] * latents.shape[3] * latents.shape[4] // 4
    return times.repeat_interleave(per_chunk, dim=1)[:, :tokens]


def at_once(model, latents, text, times):
    timestep = times_of_tokens(times, latents)
    return model(latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]


def chunk_by_chunk(model, latents, text, times):
    state = ClipState(model)
    chunks = latents.split(CHUNK, dim=2)
    return torch.cat(
        [
            state(chunk, times[:, number], encoder_hidden_states=text, append=True)
            for number, chunk in enumerate(chunks)
        ],
        dim=2,
    )


@pytest.fixture
def no_float32(monkeypatch):
    """Wan computes parts in float32 whatever its dtype is; here in float64, too."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixing_per_head": True, "conv_kernel_size": 5, "layout": (1, 2, 3)},
        {"normalize": False, "output_norm": True, "feature_map": "focused", "gate": "head"},
        {"exact": 1.0, "conv": False},
    ],
)
def test_chunk_by_chunk_is_all_at_once_in_training_and_sampling(changes, no_float32):
    model = causal_wan(changes).double()
    latents, text, times = (x.double() for x in clip(height=10, width=14))

    def run(function):
        given = latents.clone().requires_grad_()
        out = function(model, given, text, times)
        probe = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        names, weights = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(
            (out * probe).sum(), (given, *weights), materialize_grads=True
        )
        return {"out": out, "latents": gradients[0], **dict(zip(names, gradients[1:], strict=True))}

    expected, found = run(at_once), run(chunk_by_chunk)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
    with torch.no_grad():
        sampled = chunk_by_chunk(model, latents, text, times)
    torch.testing.assert_close(sampled, expected["out"], rtol=1e-9, atol=1e-9)


def test_a_chunk_is_read_again_and_again_beside_clean_ones(no_float32):
    model = causal_wan().double()
    latents, text, _ = (x.double() for x in clip())
    state, finished = ClipState(model), latents[:, :, : 2 * CHUNK]
    with torch.no_grad():
        for chunk in finished.split(CHUNK, dim=2):
            state(chunk, torch.zeros(2), encoder_hidden_states=text, append=True)
        for level in (900.0, 300.0):
            noisy = torch.randn_like(latents[:, :, :CHUNK])
            found = state(noisy, torch.full((2,), level), encoder_hidden_states=text)
            times = torch.tensor([[0, 0, level]] * 2)
            whole = at_once(model, torch.cat((finished, noisy), dim=2), text, times)
            torch.testing.assert_close(found, whole[:, :, -CHUNK:], rtol=1e-9, atol=1e-9)
    assert state.frames == 2 * CHUNK


@pytest.mark.parametrize("exact", [0.0, 1.0])
def test_later_frames_change_nothing_and_other_layers_are_untouched(exact):
    model = causal_wan({"exact": exact})
    latents, text, times = clip()
    with torch.no_grad():
        before = at_once(model, latents, text, times)
        latents[:, :, 2 * CHUNK :] += 1
        times[:, 2:] = 0
        after = at_once(model, latents, text, times)
    assert after[:, :, : 2 * CHUNK].equal(before[:, :, : 2 * CHUNK])
    assert not after[:, :, 2 * CHUNK :].equal(before[:, :, 2 * CHUNK :])
    assert not any(hasattr(block.attn2, "mhla") for block in model.blocks)


@torch.no_grad()
def test_a_clip_longer_than_the_rotary_table_goes_on(no_float32):
    model = causal_wan(rope_max_seq_len=16).double()
    longer = causal_wan(rope_max_seq_len=64).double()
    latents, text, times = (x.double() for x in clip(frames=21, batch=1, height=4, width=4))
    expected = at_once(longer, latents, text, times)
    found = chunk_by_chunk(model, latents, text, times)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_memory_is_constant_but_for_softmax():
    def sizes(exact):
        model, found = causal_wan({"exact": exact}), []
        latents, text, times = clip(frames=12)
        state = ClipState(model)
        for number, chunk in enumerate(latents.split(CHUNK, dim=2)):
            state(chunk, times[:, number], encoder_hidden_states=text, append=True)
            found.append(state.bytes)
            kept = [tensor for layer in state.layers.values() for tensor in layer.tensors]
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in kept}
            assert sum(storage.nbytes() for storage in storages.values()) == state.bytes
        return found

    assert len(set(sizes(0.0))) == 1
    assert len(set(sizes(1.0))) > 2


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"exact": 1.0}, {"conv": False, "layout": (3, 9, 2)}])
def test_a_state_is_copied_saved_and_moved(changes, tmp_path):
    model = causal_wan(changes)
    latents, text, times = clip()
    first, *others = latents.split(CHUNK, dim=2)
    state = ClipState(model)
    state(first, times[:, 0], encoder_hidden_states=text, append=True)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt")
    found = []
    for other in (
        copy.deepcopy(state),
        copy.deepcopy(ClipState.from_state_dict(model, saved)),
        ClipState.from_state_dict(model, ClipState.from_state_dict(model, saved).state_dict()),
        copy.deepcopy(state).to("cpu"),
        state,
    ):
        assert other.model is model and (other is state or other.layers is not state.layers)
        assert set(other.layers) == set(state.layers) and other.frames == CHUNK
        outs = [
            other(chunk, time, encoder_hidden_states=text, append=True)
            for chunk, time in zip(others, times.unbind(1)[1:], strict=True)
        ]
        found.append(torch.cat(outs, dim=2))
        with pytest.raises(UserError, match="clip's last"):
            other(first, times[:, 0], encoder_hidden_states=text)
    for out in found[:-1]:
        torch.testing.assert_close(out, found[-1], rtol=1e-4, atol=1e-4)
    loaded = ClipState.from_state_dict(model, saved)
    for moved in (state, loaded):
        assert moved.bytes > 0 and moved.to("meta") is moved
        assert all(tensor.is_meta for layer in moved.layers.values() for tensor in layer.tensors)
    with pytest.raises(TypeError):
        state.to(torch.float16)


@torch.no_grad()
def test_a_state_is_loaded_by_its_own_model_alone(tmp_path):
    model = causal_wan()
    latents, text, times = clip()
    state = ClipState(model)
    state(latents[:, :, :CHUNK], times[:, 0], encoder_hidden_states=text, append=True)
    saved = state.state_dict()
    for other, message in (
        (causal_wan(num_layers=1), "a model with num_layers=3, found one with 1"),
        (causal_wan(num_attention_heads=1), "num_heads=2, found one with 1"),
        (causal_wan(attention_head_dim=32), "head_dim=12, found one with 32"),
        (causal_wan({"exact": 1.0}), "exact=0.0, found one with 1.0"),
        (causal_wan({"feature_map": "elu+1"}), "feature_map=relu"),
        (causal_wan({"causal_frames": 3}), "causal_frames=2, found one with 3"),
        # As many blocks, but others.
        (causal_wan({"layout": (3, 1, 4)}), "layout="),
        (causal_wan({"conv": False}), "conv=True"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            ClipState.from_state_dict(other, saved)
    with pytest.raises(UserError, match="give what state_dict returned"):
        ClipState.from_state_dict(model, {"frames": 2, "layers": []})
    # The model itself, read from a folder, and with another implementation.
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert ClipState.from_state_dict(again, saved).frames == CHUNK
    ClipState.from_state_dict(causal_wan({"implementation": "blockwise"}), saved)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"exact": 1.0}])
def test_a_loaded_state_takes_chunks_of_its_own_size_and_dtype(changes):
    model = causal_wan(changes)
    latents, text, times = clip()
    state = ClipState(model)
    state(latents[:, :, :CHUNK], times[:, 0], encoder_hidden_states=text, append=True)
    saved = state.state_dict()
    chunk, time = latents[:, :, CHUNK : 2 * CHUNK], times[:, 1]
    expected = state(chunk, time, encoder_hidden_states=text)
    loaded = ClipState.from_state_dict(model, saved)
    for wrong, some in ((chunk[..., :-2], 2), (chunk[:1], 1)):
        with pytest.raises(UserError, match="height, width, dtype"):
            loaded(wrong, time[:some], encoder_hidden_states=text[:some], append=True)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UserError, match=r"'float32'.*'bfloat16'"),
    ):
        loaded(chunk, time, encoder_hidden_states=text, append=True)
    assert torch.equal(loaded(chunk, time, encoder_hidden_states=text), expected)
    half = ClipState.from_state_dict(copy.deepcopy(model).bfloat16(), saved)
    with pytest.raises(UserError, match=r"'float32'.*'bfloat16'"):
        half(chunk.bfloat16(), time, encoder_hidden_states=text.bfloat16(), append=True)


@torch.no_grad()
@pytest.mark.parametrize("exact", [0.0, 1.0])
@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
def test_a_chunk_that_some_layers_have_added_ends_a_state(error, exact):
    model = causal_wan({"exact": exact})
    latents, text, times = clip(frames=2 * CHUNK)
    first, second = latents.split(CHUNK, dim=2)
    options = {"timestep": times[:, 0], "encoder_hidden_states": text}
    state = ClipState(model)
    state(first, **options, append=True)

    def fail(*_):
        raise error

    hook = model.blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        state(second, **options)
    hook.remove()
    before = state(second, **options)
    hook = model.blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        state(second, **options, append=True)
    hook.remove()
    with pytest.raises(UserError, match="added in part"):
        state(second, **options)
    again = ClipState(model)
    again(first, **options, append=True)
    assert torch.equal(again(second, **options), before)


def test_saved_loaded_restored(tmp_path):
    plain = tiny_wan()
    pipeline = tiny_wan_pipeline()
    pipeline.transformer.load_state_dict(plain.state_dict())
    mhla_gen.inject(pipeline, MHLAConfig(causal_frames=CHUNK))
    model = disturb(pipeline.transformer)
    assert model.mhla_config.layout[0] == 11  # 21 latent frames
    assert all(row.kind == "causal mhla" for row in mhla_gen.summary(pipeline))
    latents, text, times = clip(batch=1)
    pipeline.save_pretrained(tmp_path)
    loaded = WanPipeline.from_pretrained(
        tmp_path, tokenizer=None, text_encoder=None, transformer_2=None
    ).transformer
    assert isinstance(loaded.blocks[0].attn1.mhla, FrameCausalMHLA)
    with torch.no_grad():
        assert at_once(loaded, latents, text, times).equal(at_once(model, latents, text, times))
        mhla_gen.restore(pipeline)
        found = at_once(pipeline.transformer, latents, text, times)
        assert found.equal(at_once(plain, latents, text, times))


def trace_blocks(model):
    """As `compile_blocks`, without making code of what was traced."""
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")


@torch.no_grad()
def test_chunks_have_one_compiled_form():
    model, traced = causal_wan(num_layers=1), causal_wan(num_layers=1)
    trace_blocks(traced)
    latents, text, times = clip(frames=10, batch=1)
    torch._dynamo.utils.counters.clear()
    found = chunk_by_chunk(traced, latents, text, times)
    torch.testing.assert_close(
        found, chunk_by_chunk(model, latents, text, times), rtol=1e-4, atol=1e-5
    )
    # The first chunk has nothing before it, the second has, the others differ in numbers only.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.slow
def test_compiled_it_is_the_same():
    model, compiled = causal_wan(num_layers=1), causal_wan(num_layers=1)
    compile_blocks(compiled)
    latents, text, times = clip(frames=10, batch=1)
    close = {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        expected = chunk_by_chunk(model, latents, text, times)
        torch.testing.assert_close(
            chunk_by_chunk(compiled, latents, text, times), expected, **close
        )
    out = at_once(compiled, latents, text, times)
    torch.testing.assert_close(out, expected, **close)
    out.square().mean().backward()
    at_once(model, latents, text, times).square().mean().backward()
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_is_refused():
    for changes, message in (
        ({"layers": [0]}, "causal_frames needs layers=all"),
        ({"exact": 0.2}, "causal_frames takes exact=0 or 1"),
        ({"magnitude": True}, "causal_frames needs magnitude=false"),
    ):
        with pytest.raises(UserError, match=message):
            MHLAConfig(causal_frames=2, **changes)
    with pytest.raises(UserError, match="causal_frames is for Wan's"):
        mhla_gen.inject(tiny_dit(), MHLAConfig(causal_frames=2))
    with pytest.raises(UserError, match="not causal over frames"):
        ClipState(mhla_gen.inject(tiny_wan(), MHLAConfig(layout=(2, 2, 2))))
    model, (latents, text, times) = causal_wan({"conv": False}), clip()
    with torch.no_grad():
        state = ClipState(model)
        state(latents[:, :, :CHUNK], times[:, 0], encoder_hidden_states=text, append=True)
        with pytest.raises(
            UserError, match=r"chunks are \(batch, channels, height, width, dtype\)"
        ):
            state(latents[..., :-2], times[:, 0], encoder_hidden_states=text)
    model = causal_wan()
    model.enable_gradient_checkpointing()
    with pytest.raises(UserError, match="disable_gradient_checkpointing"):
        chunk_by_chunk(model, latents, text, times)
    # A clip at once may be recomputed.
    at_once(model, latents, text, times).sum().backward()
