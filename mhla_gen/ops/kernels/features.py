"""Feature maps of a tile of rows, and rotary embeddings."""

import triton
import triton.language as tl


@triton.jit
def phi(x, FEATURE_MAP: tl.constexpr):
    """The feature map, elementwise in float32; see `mhla_gen.ops.feature_maps`."""
    if FEATURE_MAP == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + 1e-6
    elif FEATURE_MAP == "squared_relu":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive + 1e-6
    elif FEATURE_MAP == "elu+1":
        return tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE_MAP == "softplus":
        # log(1 + y) cancels for small y, where its series is exact.
        y = tl.exp(-tl.abs(x))
        log1p = tl.where(y < 1e-2, y * (1 - y * (0.5 - y * (1 / 3 - y * 0.25))), tl.log(1.0 + y))
        return tl.maximum(x, 0.0) + log1p
    else:
        tl.static_assert(FEATURE_MAP == "identity", "unknown feature map")
        return x


@triton.jit
def features(x, FEATURE_MAP: tl.constexpr, OPERAND: tl.constexpr):
    """φ(x) as an operand."""
    if FEATURE_MAP == "relu" and x.dtype == tl.bfloat16 and tl.bfloat16 == OPERAND:
        # The same numbers as below, two at once: one addition, rounded once either way.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 zero, one, small, positive;
            mov.b32 zero, 0;
            mov.b32 one, 0x3f803f80;
            mov.b32 small, 0x35863586;
            max.NaN.bf16x2 positive, $1, zero;
            fma.rn.bf16x2 $0, positive, one, small;
            }""",
            "=r,r",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return phi(x.to(tl.float32), FEATURE_MAP).to(OPERAND)


@triton.jit
def phi_grad(x, FEATURE_MAP: tl.constexpr):
    """Derivative of `phi`."""
    if FEATURE_MAP == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif FEATURE_MAP == "squared_relu":
        return 2 * tl.maximum(x, 0.0)
    elif FEATURE_MAP == "elu+1":
        return tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE_MAP == "softplus":
        return 1 / (1 + tl.exp(-x))
    else:
        tl.static_assert(FEATURE_MAP == "identity", "unknown feature map")
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def rotate(x, cos, sin):
    """Rotate interleaved pairs of channels of `x` [BT, BD] by `cos`, `sin` [BT, BD / 2]."""
    BT: tl.constexpr = x.shape[0]
    BD: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, (BT, BD // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BT, BD))


@triton.jit
def load_angles(
    cos_ptr, sin_ptr, tokens, valid, D: tl.constexpr, START: tl.constexpr, B: tl.constexpr
):
    """Float32 cos and sin [tokens, B / 2] of channels [START, START + B)."""
    pairs = START // 2 + tl.arange(0, B // 2)
    offsets = tokens[:, None] * (D // 2) + pairs[None, :]
    mask = valid[:, None] & (pairs < D // 2)[None, :]
    cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)
