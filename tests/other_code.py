"""Checkpoints and forward passes of other people's code.

The forward passes are written out from the papers and the names of the weights, as plainly as they
can be: attention as one matrix of weights between tokens.
"""

import math

import torch
import torch.nn.functional as F

HIDDEN, HEADS, DEPTH, PATCH, SIDE = 32, 2, 3, 2, 4


def weights(shapes):
    return {key: 0.3 * torch.randn(shape) for key, shape in shapes.items()}


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def sine_cosine_table():
    """Column in the first half of the channels, row in the second; sines, then cosines."""
    frequencies = 10000.0 ** (-torch.arange(HIDDEN // 4, dtype=torch.float64) / (HIDDEN // 4))
    angles = torch.arange(SIDE, dtype=torch.float64)[:, None] * frequencies
    place = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = place.repeat(SIDE, 1), place.repeat_interleave(SIDE, 0)
    return torch.cat([columns, rows], dim=1)[None].float()


def dit_state(attention=("qkv", "proj")):
    """A checkpoint with the names and shapes of facebookresearch/DiT."""
    shapes = {
        "x_embedder.proj.weight": (HIDDEN, 4, PATCH, PATCH),
        "x_embedder.proj.bias": (HIDDEN,),
        "y_embedder.embedding_table.weight": (11, HIDDEN),
        **linear("t_embedder.mlp.0", HIDDEN, 256),
        **linear("t_embedder.mlp.2", HIDDEN, HIDDEN),
        **linear("final_layer.linear", 8 * PATCH**2, HIDDEN),
        **linear("final_layer.adaLN_modulation.1", 2 * HIDDEN, HIDDEN),
    }
    for i in range(DEPTH):
        shapes |= linear(f"blocks.{i}.attn.{attention[0]}", 3 * HIDDEN, HIDDEN)
        shapes |= linear(f"blocks.{i}.attn.{attention[1]}", HIDDEN, HIDDEN)
        shapes |= linear(f"blocks.{i}.mlp.fc1", 4 * HIDDEN, HIDDEN)
        shapes |= linear(f"blocks.{i}.mlp.fc2", HIDDEN, 4 * HIDDEN)
        shapes |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * HIDDEN, HIDDEN)
    return weights(shapes) | {"pos_embed": sine_cosine_table()}


def mhla_dit_state():
    state = dit_state(("to_qkv", "to_out.0"))
    for i in range(DEPTH):
        state[f"blocks.{i}.attn.piece_attn.conv.weight"] = torch.rand(4, 4, 1, 1)
        state |= weights({f"blocks.{i}.attn.lepe.weight": (HIDDEN, 1, 3, 3)})
        state |= weights({f"blocks.{i}.attn.lepe.bias": (HIDDEN,)})
    return state


def apply(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def softmax_attention(state, name, x):
    query, key, value = (
        part.unflatten(2, (HEADS, -1)).transpose(1, 2)
        for part in apply(state, f"{name}.qkv", x).chunk(3, dim=2)
    )
    scores = query @ key.transpose(2, 3) / math.sqrt(HIDDEN // HEADS)
    out = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return apply(state, f"{name}.proj", out)


def blocks_of(grid, layout):
    """Block number of every token of a grid that its layout divides."""
    axes = [torch.arange(n) * blocks // n for n, blocks in zip(grid, layout, strict=True)]
    number = torch.zeros((), dtype=torch.int64)
    for axis, blocks in zip(axes, layout, strict=True):
        number = number.unsqueeze(-1) * blocks + axis
    return number.flatten()


def eq4_attention(state, name, x):
    """Eq. 4 of the paper as one matrix of weights between tokens, plus the convolution of V."""
    query, key, value = apply(state, f"{name}.to_qkv", x).chunk(3, dim=2)
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (query, key, value))
    block = blocks_of((SIDE, SIDE), (2, 2))
    mixing = state[f"{name}.piece_attn.conv.weight"][:, :, 0, 0][block][:, block]
    pairs = ((q.relu() + 1e-6) @ (k.relu() + 1e-6).transpose(2, 3)) * mixing
    out = (pairs @ v / (pairs.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2).flatten(2)
    image = value.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    lepe = F.conv2d(
        image, state[f"{name}.lepe.weight"], state[f"{name}.lepe.bias"], padding=1, groups=HIDDEN
    )
    return apply(state, f"{name}.to_out.0", out + lepe.flatten(2).transpose(1, 2))


def other_dit(state, hidden_states, timestep, class_labels, attention=softmax_attention):
    """DiT as published: adaLN-zero blocks, one embedder for all of them."""
    patches = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    tokens = F.conv2d(hidden_states, *patches, stride=PATCH).flatten(2).transpose(1, 2)
    tokens = tokens + state["pos_embed"]
    angles = timestep[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = torch.cat([angles.cos(), angles.sin()], dim=1)
    time = apply(state, "t_embedder.mlp.2", F.silu(apply(state, "t_embedder.mlp.0", time)))
    condition = F.silu(time + state["y_embedder.embedding_table.weight"][class_labels])

    def modulated(x, shift, scale):
        return F.layer_norm(x, (HIDDEN,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    for i in range(DEPTH):
        name = f"blocks.{i}"
        parts = apply(state, f"{name}.adaLN_modulation.1", condition).chunk(6, dim=1)
        inner = attention(state, f"{name}.attn", modulated(tokens, *parts[:2]))
        tokens = tokens + parts[2][:, None] * inner
        inner = apply(state, f"{name}.mlp.fc1", modulated(tokens, *parts[3:5]))
        inner = apply(state, f"{name}.mlp.fc2", F.gelu(inner, approximate="tanh"))
        tokens = tokens + parts[5][:, None] * inner
    shift, scale = apply(state, "final_layer.adaLN_modulation.1", condition).chunk(2, dim=1)
    out = apply(state, "final_layer.linear", modulated(tokens, shift, scale))
    out = out.unflatten(2, (PATCH, PATCH, 8)).unflatten(1, (SIDE, SIDE))
    return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def wan_state(extras=(), layers=(1, 2), num_blocks=12):
    """A checkpoint with the names of Wan and, in some layers, of the authors' MHLA."""
    width = 24
    shapes = {
        "patch_embedding.weight": (width, 16, 1, 2, 2),
        "patch_embedding.bias": (width,),
        **linear("text_embedding.0", width, 16),
        **linear("text_embedding.2", width, width),
        **linear("time_embedding.0", width, 16),
        **linear("time_embedding.2", width, width),
        **linear("time_projection.1", 6 * width, width),
        **linear("head.head", 64, width),
        "head.modulation": (1, 2, width),
    }
    for i in range(DEPTH):
        for layer in ("self_attn", "cross_attn"):
            for name in "qkvo":
                shapes |= linear(f"blocks.{i}.{layer}.{name}", width, width)
            shapes |= {f"blocks.{i}.{layer}.norm_{name}.weight": (width,) for name in "qk"}
        shapes |= {f"blocks.{i}.norm3.{leaf}": (width,) for leaf in ("weight", "bias")}
        shapes |= linear(f"blocks.{i}.ffn.0", 32, width) | linear(f"blocks.{i}.ffn.2", width, 32)
        shapes[f"blocks.{i}.modulation"] = (1, 6, width)
    for i in layers:
        name = f"blocks.{i}.self_attn"
        shapes |= {f"{name}.g_norm.weight": (12,)}
        if "g" in extras:
            shapes |= linear(f"{name}.g", width, width)
        if "lepe" in extras:
            shapes |= {f"{name}.lepe.weight": (width, 1, 3, 3, 3), f"{name}.lepe.bias": (width,)}
    mixing = {
        f"blocks.{i}.self_attn.block_attn.conv.weight": torch.randn(num_blocks, num_blocks, 1, 1)
        for i in layers
    }
    return weights(shapes) | mixing


def authors_wan_attention(state, name, x, grid, layout):
    """No denominator, rotation behind the feature map, every head normalised, then the extras."""

    def rms(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def rotated(x):
        """Complex rotation; half of the channels of a head in thirds for t, h and w."""
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        third = pairs.shape[-1] // 3
        angles = []
        for axis, count in enumerate((pairs.shape[-1] - 2 * third, third, third)):
            steps = torch.arange(grid[axis], dtype=torch.float64)
            steps = steps.view([-1 if i == axis else 1 for i in range(3)]).expand(grid).flatten()
            frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
            angles.append(steps[:, None] * frequencies)
        angle = torch.cat(angles, dim=1)[None, :, None]
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    query, key, value = (apply(state, f"{name}.{part}", x) for part in "qkv")
    q, k = (
        (rms(part, state[f"{name}.norm_{letter}.weight"]).relu() + 1e-6).unflatten(2, (-1, 12))
        for part, letter in ((query, "q"), (key, "k"))
    )
    block = blocks_of(grid, layout)
    mixing = state[f"{name}.block_attn.conv.weight"][:, :, 0, 0][block][:, block].double()
    pairs = torch.einsum("bnhd,bmhd->bhnm", rotated(q), rotated(k)) * mixing
    out = torch.einsum("bhnm,bmhd->bnhd", pairs, value.unflatten(2, (-1, 12)).double()).float()
    out = rms(out, state[f"{name}.g_norm.weight"]).flatten(2)
    if f"{name}.g.weight" in state:
        out = out * F.silu(apply(state, f"{name}.g", x))
    if f"{name}.lepe.weight" in state:
        kernel = state[f"{name}.lepe.weight"], state[f"{name}.lepe.bias"]
        clip = value.transpose(1, 2).unflatten(2, grid)
        out = out + F.conv3d(clip, *kernel, padding=1, groups=24).flatten(2).transpose(1, 2)
    return apply(state, f"{name}.o", out)
