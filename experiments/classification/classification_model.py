"""What classification_run.py trains and measures: images, DeiT-T, its score and its speed."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from classification_table import Arm
from torch import Tensor, nn

import mhla_gen
from mhla_gen.bench.measure import device_ms

PATCH, SIDE = 4, 64
EVERY = 4
"""One image in so many is held out."""
SIDES = (SIDE, 96, 128)
"""Image sizes at which a trained model is tested: 256, 576 and 1,024 tokens."""
SPEEDS = ((256, 256), (64, 1024), (16, 4096))
"""Batch size and tokens per image."""


@functools.cache
def load(path: str, limit: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images uint8 `[images, 3, 64, 64]`, labels, and which images are held out.

    Args:
        path: The npz file.
        limit: Take the first so many; 0 takes all.
        device: Device of the tensors.
    """
    with np.load(path, allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(arrays["labels"])
    images, labels = images[: limit or None], labels[: limit or None]
    held_out = torch.arange(len(images)) % EVERY == EVERY - 1
    return images.contiguous().to(device), labels.to(device), held_out.to(device)


def make_model(seed: int, classes: int, side: int = SIDE, depth: int = 12) -> Any:
    """DeiT-T with softmax attention, the same for all arms."""
    torch.manual_seed(seed)
    return timm.create_model(
        "deit_tiny_patch16_224",
        img_size=side,
        patch_size=PATCH,
        depth=depth,
        num_classes=classes,
        class_token=False,
        global_pool="avg",
        dynamic_img_size=True,
    )


def converted(model: Any, arm: Arm) -> Any:
    """The model with an arm's attention."""
    return model if arm.config is None else mhla_gen.inject(model, arm.config)


def normalized(images: Tensor) -> Tensor:
    """Pixels from -1 to 1, float32."""
    return images.float() / 127.5 - 1


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip at random, scale by 0.8 to 1.2 and shift by up to 6 pixels, on white."""
    count = len(images)
    rand = torch.rand(count, 4, generator=generator, device=images.device)
    flip = (rand[:, 0] < 0.5).float() * 2 - 1
    scale = 0.8 + 0.4 * rand[:, 1]
    shift = (rand[:, 2:] - 0.5) * 24 / SIDE
    zero = torch.zeros_like(scale)
    rows = [torch.stack((scale * flip, zero, shift[:, 0]), 1)]
    rows += [torch.stack((zero, scale, shift[:, 1]), 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # Pixels outside the image become zero, so white is made zero.
    return 1 - F.grid_sample(1 - normalized(images), grid, align_corners=False)


def batches(count: int, size: int, epochs: int, device: str, seed: int) -> Iterator[Tensor]:
    """Indices of the images of every step; the incomplete last batch of an epoch is dropped."""
    generator = torch.Generator(device).manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator, device=device)
        yield from order.split(size)[: count // size]


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor, side: int) -> str:
    """1 for each image that is classified correctly at a size, 0 for all others."""
    found = []
    for part, target in zip(images.split(512), labels.split(512), strict=True):
        pixels = normalized(part)
        if side != pixels.shape[-1]:
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        # Compiling for every size would take longer than it saves.
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.autocast(images.device.type, torch.bfloat16):
            found.append(model(pixels).argmax(1) == target)
    return "".join(str(int(right)) for right in torch.cat(found).tolist())


def speed(arm: Arm) -> list[dict[str, Any]]:
    """Images per second of an arm in bfloat16, forward only and with backward; random weights."""
    rows, device = [], torch.device("cuda")
    for batch, tokens in SPEEDS:
        side = PATCH * round(tokens**0.5)
        with torch.device(device):
            # Converted last, so that weights that must be float32 stay float32.
            model = converted(make_model(0, 18, side).bfloat16(), arm)
        pixels = torch.randn(batch, 3, side, side, device=device, dtype=torch.bfloat16)
        weights = [p for p in model.parameters() if p.requires_grad]

        def step(model: Any = model, pixels: Tensor = pixels, weights: Any = weights) -> object:
            return torch.autograd.grad(model(pixels).float().square().sum(), weights)

        forward = torch.no_grad()(functools.partial(model, pixels))
        row: dict[str, Any] = {"tokens": tokens, "batch": batch}
        for name, run in (("forward", forward), ("training", step)):
            ms = device_ms(run, device)
            row[f"{name}_images_per_second"] = round(batch / ms * 1e3, 1)
        rows.append(row)
    return rows
