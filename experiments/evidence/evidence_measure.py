"""Measurements of a trained model itself: loss on held-out images, and its attention."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhla_gen.inspection import LayerAttention, MHLAAttention, head_statistics, watch
from mhla_gen.models import MHLA, MHLADiTTransformer2DModel

_LEVELS = 8
"""Noise levels of the held-out loss: quantiles of the distribution that training draws from."""
_ROWS = 256
"""Number of queries whose attention is inspected."""
_MIDDLE = 0.5
"""Noise level at which attention is inspected."""


def to_samples(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 `[batch, height, width, channels]` as the model sees them, `[batch, channels, …]`."""
    return torch.from_numpy(images).to(device).movedim(-1, 1).float() / 127.5 - 1


def noise_levels(num: int = _LEVELS) -> Tensor:
    """Quantiles of the logit-normal distribution of σ, `[num]`: equally likely in training."""
    quantiles = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    return torch.special.ndtri(quantiles).sigmoid().float()


@torch.no_grad()
def held_out_loss(
    model: Any, images: np.ndarray, labels: np.ndarray, device: torch.device, batch_size: int = 128
) -> dict[str, Any]:
    """Flow-matching loss on images that were not trained on, with the same noise for every model.

    Args:
        model: The transformer.
        images: uint8 `[images, height, width, channels]`.
        labels: int64 `[images]`.
        device: Where the model is.
        batch_size: Images at a time.

    Returns:
        `mean`; `by_level`, one mean for each noise level; `per_image`, the means over levels.
    """
    generator = torch.Generator().manual_seed(0)
    columns = []
    for level, sigma in enumerate(noise_levels().tolist()):
        losses = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            samples = to_samples(images[part], device)
            generator.manual_seed(level * len(images) + start)
            noise = torch.randn(samples.shape, generator=generator).to(device)
            noisy = (1 - sigma) * samples + sigma * noise
            times = torch.full((len(samples),), 1000 * sigma, device=device)
            classes = torch.from_numpy(labels[part]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                found = model(noisy, timestep=times, class_labels=classes, return_dict=False)[0]
            error = found.float() - (noise - samples)
            losses.append(error.square().flatten(1).mean(dim=1))
        columns.append(torch.cat(losses))
    table = torch.stack(columns).double().cpu()  # [levels, images]
    return {
        "mean": float(table.mean()),
        "by_level": [round(x, 6) for x in table.mean(dim=1).tolist()],
        "per_image": [round(x, 5) for x in table.mean(dim=0).tolist()],
    }


def layer_statistics(
    model: Any, images: np.ndarray, labels: np.ndarray, device: torch.device
) -> list[dict[str, float]]:
    """Rank and entropy of the attention of every layer, means over heads and images.

    Args:
        model: The transformer.
        images: uint8 `[images, height, width, channels]`, to which noise is added.
        labels: int64 `[images]`.
        device: Where the model is.
    """
    found: dict[int, list[dict[str, float]]] = {}

    def observe(index: int, attention: LayerAttention) -> None:
        # For small matrices, singular values are faster on the CPU.
        moved: dict[str, Any] = {"query": attention.query.cpu(), "key": attention.key.cpu()}
        if isinstance(attention, MHLAAttention):
            moved["mixing"] = attention.mixing.cpu()
        attention = replace(attention, **moved)
        order = np.random.default_rng(0).permutation(attention.seq_len)[:_ROWS]
        rows = torch.from_numpy(np.sort(order))
        heads = (head_statistics(attention, rows, head) for head in range(attention.num_heads))
        found.setdefault(index, []).extend(asdict(head) for head in heads)

    generator = torch.Generator().manual_seed(0)
    for image, label in zip(to_samples(images, device), labels, strict=True):
        noise = torch.randn(image.shape, generator=generator).to(device)
        inputs = {
            "hidden_states": ((1 - _MIDDLE) * image + _MIDDLE * noise)[None],
            "timestep": torch.tensor([1000 * _MIDDLE], device=device),
            "class_labels": torch.tensor([int(label)], device=device),
        }
        # In training's precision, which also avoids another compilation of the fused kernels.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            watch(MHLADiTTransformer2DModel.family, model, inputs, observe)
    return [
        {name: float(np.mean([head[name] for head in heads])) for name in heads[0]}
        for _, heads in sorted(found.items())
    ]


def mixing_statistics(model: torch.nn.Module) -> list[dict[str, float]]:
    """Statistics of the learned mixing matrices, one row per layer: means over heads and blocks.

    `own` is the share of the query's own block in a row, `entropy` the entropy of a row relative to
    that of uniform weights, `zeros` the share of entries clipped to 0.
    """
    found = []
    for module in model.modules():
        matrix = module.mixing if isinstance(module, MHLA) else None
        if matrix is None or matrix.shape[-1] == 1:
            continue
        matrix = matrix.detach().double().cpu()
        rows = matrix / matrix.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        entropy = -torch.xlogy(rows, rows).sum(dim=-1) / np.log(rows.shape[-1])
        found.append(
            {
                "own": float(rows.diagonal(dim1=-2, dim2=-1).mean()),
                "entropy": float(entropy.mean()),
                "zeros": float((matrix == 0).double().mean()),
            }
        )
    return found
