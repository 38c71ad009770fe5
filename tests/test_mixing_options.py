"""Options of the mixing matrix: heads of several scales, and content."""

import pytest
import tiny
import torch

import mhla_gen
from mhla_gen import MHLAConfig
from mhla_gen.inspection.attention_maps import MHLAAttention, watch
from mhla_gen.models import MHLA
from mhla_gen.models.content_mixing import ContentMixing, block_means
from mhla_gen.ops import locality_mixing, multiscale_mixing
from mhla_gen.ops.partition import block_of_tokens
from mhla_gen.training import build_optimizer, parameter_groups
from mhla_gen.training.optim import mixing_matrices

GRID, LAYOUT = (5, 7), (2, 3)


def test_multiscale_runs_from_all_blocks_alike_to_the_own_block():
    mixing = multiscale_mixing((4, 4), 5)
    torch.testing.assert_close(mixing.sum(dim=-1), torch.ones(5, 16))
    torch.testing.assert_close(mixing[0], torch.full((16, 16), 1 / 16))
    own = mixing.diagonal(dim1=-2, dim2=-1)
    assert (own.diff(dim=0) > 0).all()
    assert own[-1].min() > 0.9
    # The base of the powers is the paper's locality.
    one = multiscale_mixing((2, 3), 5)[1]  # 16 ** (1 / 4) - 1 = 1
    torch.testing.assert_close(one, locality_mixing((2, 3)))
    assert multiscale_mixing((1, 1), 2).tolist() == [[[1.0]], [[1.0]]]


def test_multiscale_needs_matrices_per_head():
    with pytest.raises(ValueError, match="mixing_per_head=true"):
        MHLAConfig(mixing_init="multiscale")
    config = MHLAConfig(layout=LAYOUT, mixing_init="multiscale", mixing_per_head=True)
    layer = MHLA(3, 8, 24, config)
    assert torch.equal(layer.mixing, multiscale_mixing(LAYOUT, 3))


def test_block_means_are_means_of_ragged_blocks():
    tokens = torch.randn(2, 35, 3, 4)
    means = block_means(tokens, GRID, LAYOUT)
    block = block_of_tokens(GRID, LAYOUT)
    for b in range(6):
        torch.testing.assert_close(means[:, b], tokens[:, block == b].mean(dim=1))


@pytest.mark.parametrize("per_head", [False, True])
def test_content_starts_as_the_plain_matrix_and_learns(per_head):
    config = MHLAConfig(layout=LAYOUT, mixing_per_head=per_head, conv=False, gate=False)
    plain = MHLA(2, 8, 16, config)
    from_content = MHLA(2, 8, 16, MHLAConfig(**config.to_dict() | {"content_mixing": True}))
    query, key, value = torch.randn(3, 2, 35, 2, 8)
    hidden = torch.randn(2, 35, 16)
    expected = plain(query, key, value, hidden, GRID)
    out = from_content(query, key, value, hidden, GRID)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert from_content.content.weight.grad.abs().min() > 0
    with torch.no_grad():
        from_content.content.weight.add_(1)
    changed = from_content(query, key, value, hidden, GRID)
    assert not torch.allclose(changed, expected, atol=1e-3)


def test_content_reads_more_of_blocks_whose_keys_agree():
    content = ContentMixing(1, 4)
    content.weight.data.fill_(2.0)
    query, key = torch.ones(1, 35, 1, 4), torch.zeros(1, 35, 1, 4)
    key[:, block_of_tokens(GRID, LAYOUT) == 4] = 1.0
    static = torch.rand(6, 6)
    mixing = content(static, query, key, GRID, LAYOUT)
    assert mixing.shape == (1, 1, 6, 6)
    ratio = (mixing / static)[0, 0]
    torch.testing.assert_close(ratio.sum(dim=-1), torch.full((6,), 6.0))
    others = [0, 1, 2, 3, 5]
    assert (ratio[:, 4:5] > 2 * ratio[:, others]).all()


def test_samples_do_not_see_each_other():
    model = mhla_gen.inject(tiny.tiny_dit(), MHLAConfig(layout=(2, 2), content_mixing=True))
    for block in model.transformer_blocks:
        block.attn1.mhla.content.weight.data.normal_()
    inputs = tiny.dit_inputs(batch=2)
    with torch.no_grad():
        both = model(**inputs).sample
        alone = model(**{name: x[:1] for name, x in inputs.items()}).sample
    torch.testing.assert_close(both[:1], alone)


def test_saved_and_loaded(tmp_path):
    config = MHLAConfig(
        layout=(2, 2), content_mixing=True, mixing_per_head=True, mixing_init="multiscale"
    )
    model = mhla_gen.inject(tiny.tiny_dit(), config)
    for block in model.transformer_blocks:
        block.attn1.mhla.content.weight.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = mhla_gen.MHLADiTTransformer2DModel.from_pretrained(tmp_path)
    inputs = tiny.dit_inputs()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


def test_inspection_sees_the_matrix_of_the_input():
    model = mhla_gen.inject(
        tiny.tiny_dit(), MHLAConfig(layout=(2, 2), content_mixing=True, conv=False, gate=False)
    )
    for block in model.transformer_blocks:
        block.attn1.mhla.content.weight.data.normal_(std=3)
    outputs, seen = [], []
    for block in model.transformer_blocks:
        block.attn1.to_out[0].register_forward_pre_hook(
            lambda module, args: outputs.append(args[0][0].double())
        )
    values = []
    for block in model.transformer_blocks:
        block.attn1.to_v.register_forward_hook(
            lambda module, args, out: values.append(out[0].double().unflatten(-1, (2, 8)))
        )
    inputs = tiny.dit_inputs(batch=1)
    watch(model.family, model, inputs, lambda index, attention: seen.append(attention))
    for attention, value, output in zip(seen, values, outputs, strict=True):
        assert isinstance(attention, MHLAAttention)
        rows = torch.arange(attention.seq_len)
        heads = [attention.weights(rows, h) @ value[:, h] for h in range(2)]
        torch.testing.assert_close(torch.cat(heads, dim=-1), output, rtol=1e-4, atol=1e-5)


def test_mixing_can_have_a_learning_rate_of_its_own():
    model = mhla_gen.inject(tiny.tiny_dit(), MHLAConfig(layout=(2, 2)))
    groups = parameter_groups(model, 0.1, mixing_learning_rate=0.5)
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    matrices = mixing_matrices(model)
    assert {id(p) for p in groups[2]["params"]} == {id(m) for m in matrices}
    before = [m.detach().clone() for m in matrices]
    optimizer = build_optimizer(model, 1e-3, 0.0, mixing_learning_rate=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weight = model.proj_out_2.weight.detach().clone()
    optimizer.step()
    # AdamW's first step is its learning rate.
    torch.testing.assert_close(weight - model.proj_out_2.weight, torch.full_like(weight, 1e-3))
    for matrix, old in zip(matrices, before, strict=True):
        torch.testing.assert_close(matrix, (old - 0.05).clamp(0, 1))
    softmax = parameter_groups(tiny.tiny_dit(), 0.1, mixing_learning_rate=0.5)
    assert len(softmax) == 2
