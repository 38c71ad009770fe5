"""Causal MHLA in tiny random language models of transformers."""

import copy
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from accelerate import disk_offload
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import mhla_gen
from mhla_gen import CausalMHLAConfig, LinformerConfig, MHLAConfig, inject, restore, summary
from mhla_gen.errors import UserError
from mhla_gen.models.causal_decoder import CACHE
from mhla_gen.models.language import LANGUAGE_CLASSES
from mhla_gen.runtime.recorded_training import RecordedTraining

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIG = CausalMHLAConfig(block_size=4, num_blocks=3)
WINDOW = replace(CONFIG, window=5)
ATTENTIONS = pytest.mark.parametrize("config", [CONFIG, WINDOW], ids=["mhla", "window"])


def softmax_model(softmax_class=transformers.LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    model = softmax_class(softmax_class.config_class(**(SIZES | changes))).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(std=0.3)
    return model


def mhla_model(config=CONFIG, softmax_class=transformers.LlamaForCausalLM, **changes):
    model = inject(softmax_model(softmax_class, **changes), config)
    for name, parameter in model.named_parameters():
        if ".mhla." in name:
            parameter.data.normal_()
    return model


def prompt(batch=2, seq_len=21, seed=1):
    return torch.randint(1, 50, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("softmax_class", LANGUAGE_CLASSES)
@pytest.mark.parametrize("layers", ["all", [1]])
@ATTENTIONS
def test_trains_under_autocast(softmax_class, layers, config):
    model = mhla_model(replace(config, layers=layers), softmax_class)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(prompt(), labels=prompt()).loss
    loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if ".mhla." in name]
    assert grads and all(grad is not None and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("softmax_class", LANGUAGE_CLASSES)
@pytest.mark.parametrize("layers", ["all", [1]])
@ATTENTIONS
def test_chunked_cached_and_uncached_logits_agree(softmax_class, layers, config):
    config = replace(config, layers=layers, mixing_per_head=True)
    model = mhla_model(config, softmax_class).double()
    ids = prompt()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        assert not torch.allclose(whole, softmax_model(softmax_class).double()(ids).logits)
        for cuts in ((21,), (6, 1, 1, 9, 4), (1,) * 21):
            cache, found = DynamicCache(config=model.config), []
            for part in ids.split(cuts, dim=1):
                found.append(model(part, **{CACHE: cache}).logits)
            torch.testing.assert_close(torch.cat(found, dim=1), whole)


@pytest.mark.parametrize("layers", ["all", [0, 2]])
@ATTENTIONS
def test_left_padding_changes_nothing(layers, config):
    model = mhla_model(replace(config, layers=layers)).double()
    ids = prompt(batch=1, seq_len=13)
    padded = torch.cat((prompt(1, 6, seed=5), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(ids).logits
        together = model(
            torch.cat((padded, prompt(1, 19))),
            attention_mask=torch.cat((mask, torch.ones_like(mask))),
            position_ids=torch.cat((positions, torch.arange(19)[None])),
        ).logits
    torch.testing.assert_close(together[:1, 6:], alone)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}])
@pytest.mark.parametrize("layers", ["all", [1]])
@ATTENTIONS
def test_generate_is_what_whole_sequences_give(options, layers, config):
    model = mhla_model(replace(config, layers=layers), initializer_range=0.3).double()
    ids = prompt(batch=2, seq_len=9)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    cached = model.generate(ids, **settings, **options)
    plain = {k: v for k, v in options.items() if k == "num_beams"}
    uncached = model.generate(ids, use_cache=False, **settings, **plain)
    assert cached.shape == (2, 21)
    assert torch.equal(cached, uncached)
    alone = model.generate(ids[:1, 5:], **(settings | {"attention_mask": mask[:1, 5:]}), **options)
    assert torch.equal(cached[:1, 5:], alone)


def test_the_cache_does_not_grow_with_finished_blocks():
    model = mhla_model()
    ids = prompt(batch=1, seq_len=60)
    cache = model(ids, use_cache=True)[CACHE]
    layer = cache.layers[0]
    assert layer.state.linear.num_summaries == 3
    assert layer.get_seq_length() == 60
    assert layer.keys is None
    cache.batch_repeat_interleave(2)
    assert layer.state.lengths.tolist() == [60, 60]
    cache.reset()
    assert cache.get_seq_length() == 0


@ATTENTIONS
def test_saves_loads_and_restores(tmp_path, config):
    stock = softmax_model()
    ids = prompt()
    before = stock(ids).logits
    names = set(stock.state_dict())
    model = mhla_model(config)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    for model_class in (mhla_gen.MHLALlamaForCausalLM, AutoModelForCausalLM):
        loaded = model_class.from_pretrained(tmp_path)
        assert type(loaded) is mhla_gen.MHLALlamaForCausalLM
        assert torch.equal(loaded.eval()(ids).logits, expected)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].self_attn.mhla.log_weights.dtype == torch.float32
    assert half(ids).logits.dtype == torch.bfloat16
    restored = restore(loaded)
    assert type(restored) is transformers.LlamaForCausalLM
    assert set(restored.state_dict()) == names
    assert torch.equal(restored(ids).logits, before)
    restored.save_pretrained(tmp_path / "softmax")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax")
    assert torch.equal(again.eval()(ids).logits, before)


def test_a_folder_of_another_class_is_named_with_what_loads_it(tmp_path):
    """transformers would only warn, and run the weights of a Llama as a Mistral."""
    mhla_model().save_pretrained(tmp_path / "llama")
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    for folder, remedy in (
        ("llama", r"MHLALlamaForCausalLM\.from_pretrained"),
        ("wan", r"MHLAWanTransformer3DModel\.from_base"),
    ):
        with pytest.raises(UserError, match=rf"not MHLAMistral.*mhla_gen\.{remedy}"):
            mhla_gen.MHLAMistralForCausalLM.from_pretrained(tmp_path / folder)
    by_name = {"pretrained_model_name_or_path": tmp_path / "llama", "dtype": torch.bfloat16}
    loaded = mhla_gen.MHLALlamaForCausalLM.from_pretrained(**by_name)
    assert loaded.dtype == torch.bfloat16


def test_hidden_states_are_recorded_as_those_of_softmax(tmp_path):
    injected = mhla_model(replace(CONFIG, layers=(1,)))
    injected.save_pretrained(tmp_path)
    for model in (injected, AutoModelForCausalLM.from_pretrained(tmp_path)):
        found = model(prompt(), output_hidden_states=True).hidden_states
        layers, hidden = model.model.layers, model.model.embed_tokens(prompt())
        assert len(found) == 1 + len(layers) and torch.equal(found[0], hidden)
        assert torch.equal(found[-1], model.model(prompt()).last_hidden_state)


def test_converting_does_not_check_a_models_softmax_again():
    model = softmax_model()
    # As where a library that it was built with is needed for a device that is not here.
    model.config._attn_implementation_internal = "flash_attention_2"
    inject(model, CONFIG)
    assert model.config._attn_implementation == "flash_attention_2"
    assert torch.isfinite(model(prompt()).logits).all()


@pytest.mark.parametrize("offloaded_first", [True, False])
def test_an_offloaded_model_computes_the_same(tmp_path, offloaded_first):
    expected, model = inject(softmax_model(), WINDOW), softmax_model()
    if not offloaded_first:
        inject(model, WINDOW)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    if offloaded_first:
        inject(model, WINDOW)
    assert model.model.layers[0].self_attn.o_proj.weight.is_meta
    torch.testing.assert_close(model(prompt()).logits, expected(prompt()).logits)
    found, tokens = (
        each.generate(prompt(), max_new_tokens=5, do_sample=False) for each in (model, expected)
    )
    assert torch.equal(found, tokens)


@pytest.mark.parametrize("learnable", [False, True])
def test_frozen_weights_are_frozen_again_when_loaded(tmp_path, learnable):
    model = mhla_model(replace(CONFIG, mixing_learnable=learnable, layers=(1,)))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert trained["model.layers.1.self_attn.mhla.log_weights"] is learnable
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == trained


def test_summary_names_layers():
    model = inject(softmax_model(), CausalMHLAConfig(layers="2/3"))
    rows = summary(model)
    assert [row.kind for row in rows] == ["softmax", "mhla", "mhla"]
    assert [row.added_parameters for row in rows] == [0, 32, 32]
    assert "2 of 3" in str(rows)
    (row, *_) = summary(inject(softmax_model(), CausalMHLAConfig(window=16)))
    assert (row.kind, row.implementation) == ("exact + mhla", "sdpa + blockwise")
    assert row.exact == sum(min(n, 16) for n in range(1, 65)) / sum(range(1, 65))
    assert [row.kind for row in summary(softmax_model())] == ["softmax"] * 3


@ATTENTIONS
def test_trains_with_checkpointing_as_without(config):
    model = mhla_model(config).train()
    ids = prompt()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all((g != 0).any() for name, g in grads[0].items() if ".mhla." in name)
    torch.testing.assert_close(*grads)


class NoReads(TorchDispatchMode):
    """Refuses to read a value: on a GPU that waits for it, and a recording cannot."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "local_scalar_dense" not in str(function)
        return function(*args, **(kwargs or {}))


@ATTENTIONS
def test_training_reads_no_values(config):
    model, ids = mhla_model(config).train(), prompt()
    with NoReads():
        model(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("linear", [True, False])
def test_a_window_as_long_as_the_sequence_is_softmax(linear):
    config = replace(CONFIG, window=21, linear=linear)
    stock, model = softmax_model().double(), mhla_model(config).double()
    ids = prompt()
    with torch.no_grad():
        expected = stock(ids).logits
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
        cache = DynamicCache(config=model.config)
        parts = [model(part, **{CACHE: cache}).logits for part in ids.split((9, 1, 4, 7), dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected)
        longer = prompt(seq_len=30)
        assert not torch.allclose(model(longer).logits[:, 21:], stock(longer).logits[:, 21:])


def test_compiles_into_one_graph():
    model = mhla_model(WINDOW, num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = prompt()
    torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)


def test_a_window_alone_is_the_softmax_of_a_sliding_window():
    model = mhla_model(replace(CONFIG, window=6, linear=False)).double()
    mistral = softmax_model(transformers.MistralForCausalLM, sliding_window=6).double()
    missing = mistral.load_state_dict(model.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    ids = prompt(seq_len=40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, mistral(ids).logits)


def test_without_settings_a_pretrained_model_keeps_a_window():
    assert inject(softmax_model()).config.mhla["window"] == 256


def test_a_converted_model_starts_at_the_window_and_a_new_one_half_way():
    config = replace(CONFIG, window=8)
    shares = []
    for model in (inject(softmax_model(), config), mhla_gen.MHLALlamaForCausalLM(
        mhla_gen.models.language.MHLALlamaConfig(**SIZES, mhla=config.to_dict())
    )):  # fmt: skip
        gate = model.model.layers[0].self_attn.mhla.combine
        shares.append(gate.to_share(torch.randn(1, 1, 32)).sigmoid().mean().item())
    assert shares == pytest.approx([0.98, 0.5])


def test_low_rank_updates_train_beside_what_was_added(tmp_path):
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["mhla"])
    model = peft.get_peft_model(mhla_model(WINDOW), settings)
    ids = prompt()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    for part in ("lora_B", "log_weights", "to_share.weight"):
        assert any(part in name for name in moved)
    model.eval()
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, use_cache=True).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(mhla_model(WINDOW), tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, expected)


def test_refusals_change_nothing():
    model = softmax_model()
    with pytest.raises(ValueError, match=r"takes CausalMHLAConfig, found MHLAConfig$"):
        inject(model, MHLAConfig())
    with pytest.raises(ValueError, match="found LinformerConfig, which reads later tokens"):
        inject(model, LinformerConfig())
    with pytest.raises(ValueError, match="set attention_dropout to 0"):
        inject(softmax_model(attention_dropout=0.1), CONFIG)
    with pytest.raises(ValueError, match="feature_map must be one of"):
        inject(model, CausalMHLAConfig(feature_map="softmax"))
    with pytest.raises(ValueError, match="leaves no attention"):
        CausalMHLAConfig(linear=False)
    with pytest.raises(ValueError, match="layer 7"):
        inject(model, CausalMHLAConfig(layers=[7]))
    with pytest.raises(ValueError, match="no MHLA layers"):
        restore(model)
    assert type(model) is transformers.LlamaForCausalLM
    assert type(model.config) is transformers.LlamaConfig
    gpt2 = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)
    # The model is refused before the settings that would not fit it either.
    for settings in (CONFIG, MHLAConfig(), None):
        with pytest.raises(
            ValueError, match=r"LlamaForCausalLM, .* converted, found a GPT2LMH\w+$"
        ):
            inject(transformers.GPT2LMHeadModel(gpt2), settings)
    with pytest.raises(ValueError, match="found a LlamaModel; convert it with its head"):
        inject(softmax_model().model, CONFIG)
    with pytest.raises(ValueError, match="the model is compiled; convert it before"):
        inject(torch.compile(softmax_model()), CONFIG)
    with pytest.raises(ValueError, match="takes CausalMHLAConfig, found dict"):
        inject(softmax_model(), {})
    with pytest.raises(ValueError, match="already has MHLA"):
        inject(mhla_model(), CONFIG)


def test_what_a_state_cannot_do_is_refused():
    model = mhla_model()
    ids = prompt(batch=1)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(ids, assistant_model=copy.deepcopy(model), max_new_tokens=2)
    with pytest.raises(ValueError, match="needs an empty DynamicCache"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    static = StaticCache(config=model.config, max_cache_len=30)
    with pytest.raises(ValueError, match="needs an empty DynamicCache"):
        model(ids, **{CACHE: static})
    with pytest.raises(ValueError, match="cannot go back"):
        model(ids, use_cache=True)[CACHE].crop(-1)
    for shape in ((1, 1, 21, 21), (1, 20), (1, 22), (2, 21)):
        with pytest.raises(ValueError, match=r"attention_mask must be \[batch, cached and new"):
            model(ids, attention_mask=torch.ones(shape))
    cache = model(ids, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match=r"here \(1, 26\), for causal MHLA; found \(1, 5\)"):
        model(ids[:, :5], attention_mask=torch.ones(1, 5), **{CACHE: cache})
    packed = torch.cat((torch.arange(10), torch.arange(11)))[None]
    with pytest.raises(ValueError, match="start again"):
        model(ids, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="start again"):
        model(ids, position_ids=packed, attention_mask=torch.ones_like(ids))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ATTENTIONS
def test_chunked_cached_and_uncached_logits_agree_on_gpu(dtype, config):
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256}
    config = replace(config, block_size=16, window=config.window and 40)
    softmax = softmax_model(**sizes)
    for parameter in softmax.parameters():
        parameter.data.mul_(0.2 if parameter.ndim > 1 else 1.0)
    model = inject(softmax, config).to("cuda", dtype)
    ids = prompt(seq_len=300).cuda()
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    bound = 1e-4 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask, "position_ids": positions}):
            whole = model(ids, use_cache=False, **given).logits.float()
            cache, found, start = DynamicCache(config=model.config), [], 0
            for count in (130, 1, 1, 60, 1, 107):
                stop = start + count
                options = {CACHE: cache}
                if given:
                    options["attention_mask"] = mask[:, :stop]
                    options["position_ids"] = positions[:, start:stop]
                found.append(model(ids[:, start:stop], **options).logits.float())
                start = stop
            difference = (torch.cat(found, dim=1) - whole)[mask.bool()]
            assert difference.norm() < bound * whole.norm()


@pytest.mark.gpu
@ATTENTIONS
def test_trains_on_gpu_as_on_the_cpu(config):
    sizes = {"hidden_size": 64, "head_dim": 16}
    ids = prompt(seq_len=70)
    grads = []
    for device in ("cpu", "cuda"):
        model = mhla_model(config, **sizes).train().to(device)
        model(ids.to(device), labels=ids.to(device)).loss.backward()
        grads.append({name: p.grad.cpu() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() < 1e-3 * grad.norm() + 1e-6, name


@pytest.mark.gpu
@ATTENTIONS
def test_recorded_training_is_launched_training_on_gpu(config):
    model = mhla_model(config, hidden_size=64, head_dim=16).train().cuda()

    def loss(ids):
        return model(ids, labels=ids).loss

    recorded, found = RecordedTraining(model, loss), []
    for compute in (loss, recorded, recorded):
        ids = prompt(seq_len=70, seed=3).cuda()
        model.zero_grad()
        compute(ids).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert recorded.replays
    for grads in found[1:]:
        for grad, expected in zip(grads, found[0], strict=True):
            torch.testing.assert_close(grad, expected)
