"""In training, queries of Wan's captions attend in groups, with the same outputs and gradients."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from tiny import tiny_wan
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mhla_gen.runtime.recomputing import _computed_again
from mhla_gen.training.wan_captions import CaptionAttnProcessor, attend_in_groups, query_groups

# Two groups for a sample, whatever its programs: a group has 1,024 queries at least.
LENGTH = 2340


class Queries(TorchFunctionMode):
    """Collects the shapes of queries of softmax attention."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.found.append((args[0] if args else kwargs["query"]).shape)
        return func(*args, **(kwargs or {}))


def layer(image, dtype=torch.float64):
    torch.manual_seed(0)
    extra = {"added_kv_proj_dim": 24} if image else {}
    made = WanAttention(
        24, heads=2, dim_head=12, cross_attention_dim_head=12, processor=WanAttnProcessor(), **extra
    )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.to(dtype)


def inputs(image, batch=2, dtype=torch.float64):
    tokens = torch.randn(batch, LENGTH, 24, dtype=dtype, requires_grad=True)
    text = torch.randn(batch, 512 + 5 if image else 7, 24, dtype=dtype, requires_grad=True)
    return tokens, text


def both(call, made, given):
    out = call(*given)
    torch.manual_seed(1)
    grad = torch.randn_like(given[0]).to(out.dtype)
    return out, *torch.autograd.grad(out, [*given, *made.parameters()], grad)


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_groups_change_neither_outputs_nor_gradients(image, batch):
    made, given = layer(image), inputs(image, batch)
    expected = both(made, made, given)
    made.set_processor(CaptionAttnProcessor())
    with Queries() as queries:
        found = both(made, made, given)
    assert queries.found == [(2 * batch, 2, LENGTH // 2, 12)] * (1 + image)
    for actual, each in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, each)


def test_without_gradients_queries_stay_together():
    made, (tokens, text) = layer(False), inputs(False)
    with torch.no_grad():
        expected = made(tokens, text)
        made.set_processor(CaptionAttnProcessor())
        with Queries() as queries:
            assert made(tokens, text).equal(expected)
    assert queries.found == [(2, 2, LENGTH, 12)]


@pytest.mark.parametrize("how", ["mask", "fused"])
def test_other_calls_are_as_without_groups(how):
    made, (tokens, text) = layer(False), inputs(False)
    mask = None
    if how == "mask":
        mask = torch.arange(7) < torch.tensor([3, 7])[:, None, None, None]
    else:
        made.fuse_projections()
        # No longer read.
        nn.init.zeros_(made.to_k.weight)
    expected = made(tokens, text, mask)
    made.set_processor(CaptionAttnProcessor())
    assert made(tokens, text, mask).equal(expected)


def test_groups_in_one_graph_that_is_computed_again():
    made, given = layer(True, torch.float32), inputs(True, dtype=torch.float32)
    made.set_processor(CaptionAttnProcessor())
    expected = both(made, made, given)
    options = {"use_reentrant": False, "preserve_rng_state": False}

    def again(*tensors):
        return _computed_again(made, options, *tensors)

    compiled = torch.compile(again, fullgraph=True, dynamic=False, backend="aot_eager")
    for actual, each in zip(both(compiled, made, given), expected, strict=True):
        torch.testing.assert_close(actual, each)


@pytest.mark.gpu
def test_groups_of_flash_attention_on_a_gpu():
    """Wan-1.3B's layer, compiled, as a step trains it on 81 frames of 480 × 832."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        made = WanAttention(
            1536, heads=12, dim_head=128, cross_attention_dim_head=128, processor=WanAttnProcessor()
        )
        given = (
            torch.randn(1, 32760, 1536, requires_grad=True),
            torch.randn(1, 512, 1536, requires_grad=True),
        )
    expected = both(made, made, given)
    made.set_processor(CaptionAttnProcessor())
    compiled = torch.compile(made, fullgraph=True, dynamic=False)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cuda", torch.bfloat16):
        found = both(compiled, made, given)
    names = ("output", "tokens", "text", *(name for name, _ in made.named_parameters()))
    for name, actual, each in zip(names, found, expected, strict=True):
        # Ten roundings to bfloat16 give 0.008; a group of eight that is missing gives 0.35. The
        # gradients of keys add up to zero but for their norm: rounding is most of this sum.
        assert name == "to_k.bias" or (actual - each).norm() < 0.25 * each.norm(), name


def test_the_number_of_groups():
    # Wan-1.3B at 81 frames of 480 × 832 and 720 × 1280, with 12 heads and 512 tokens of a caption.
    assert query_groups(32760, 48) == query_groups(75600, 48) == 8
    # A GPU that is full, a clip that is short, a length without divisors.
    assert query_groups(32760, 384) == query_groups(2047, 1) == query_groups(32749, 1) == 1
    for length, programs in product(
        (1, 128, 2048, 2176, 2340, 9216, 16384, 32760), (1, 48, 200, 4000)
    ):
        groups = query_groups(length, programs)
        assert length % groups == 0
        assert groups == 1 or length // groups >= 1024
        assert length % 128 or (length // groups) % 128 == 0


def test_only_a_models_own_processors_are_replaced():
    class Other(WanAttnProcessor):
        pass

    model = tiny_wan()
    model.blocks[0].attn2.set_processor(Other())
    attend_in_groups(model)
    kinds = [type(block.attn2.processor) for block in model.blocks]
    assert kinds == [Other] + [CaptionAttnProcessor] * (len(kinds) - 1)
    assert {type(block.attn1.processor) for block in model.blocks} == {WanAttnProcessor}
