"""Make the clips of docs/evidence.md: emoji that move, turn, scale and hide each other.

    python experiments/evidence/moving_emoji.py emoji64.npz clips.npz [--clips 6144]

emoji64.npz is what experiments/evidence/emoji_dataset.py makes. The rule, with a fixed seed:

- The class of a clip is that of its three emoji, drawn on white, later ones in front.
- An emoji starts anywhere, moves by up to 2.5 pixels per frame along each axis, and bounces off the
  borders; it rotates by up to 18 degrees per frame, and its size varies by a quarter around a mean
  of 10 to 18 pixels.
- One emoji in sixteen appears in held-out clips only, and held-out clips show no others.

So the content of a token reappears in other frames, at positions that only the content determines,
and what is hidden in one frame is visible in another. A clip is stored as a mosaic of its nine
frames, row by row: `arr_0` is uint8 `[clips, 96, 96, 3]` with held-out clips last, and `num_train`
is the index of the first of these.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from mhla_gen.files import written_whole

FRAMES, SIDE = 9, 32
COLUMNS = 3
"""Frames in a row of a mosaic, and rows."""
_OBJECTS = 3
_HELD_OUT = 16
_SPEED, _TURN = 2.5, 18.0
_SIZES, _SWING = (10.0, 18.0), 0.25
_NEARLY_WHITE = 250
_BATCH = 256


@dataclass(frozen=True)
class Motion:
    """Positions of the emoji in each frame of several clips, `[clips, objects, frames]` each."""

    rows: np.ndarray
    """Of the middle, in pixels from the top."""
    columns: np.ndarray
    angles: np.ndarray
    """In radians."""
    sizes: np.ndarray
    """Side of the square, in pixels."""


def cut_out(images: np.ndarray) -> Tensor:
    """Emoji without the white around them, at half their size.

    Args:
        images: uint8 `[emoji, height, width, 3]` on white.

    Returns:
        Float32 `[emoji, 4, height / 2, width / 2]`: colours times opacity, and opacity, in [0, 1].
    """
    opacity = np.empty(images.shape[:3], np.float32)
    for image, opaque in zip(images, opacity, strict=True):
        regions, _ = ndimage.label((image >= _NEARLY_WHITE).all(axis=-1))
        border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
        opaque[:] = ~np.isin(regions, border[border > 0])
    alpha = torch.from_numpy(opacity)[:, None]
    colours = torch.from_numpy(images).movedim(-1, 1).float() / 255
    return F.avg_pool2d(torch.cat([colours * alpha, alpha], dim=1), 2)


def draw_motion(count: int, random: np.random.Generator) -> Motion:
    """Draw the motion of the emoji in `count` clips."""
    shape, times = (count, _OBJECTS, 1), np.arange(FRAMES)
    starts = random.uniform(0, SIDE, (2, *shape))
    places = starts + random.uniform(-_SPEED, _SPEED, (2, *shape)) * times
    # A place beyond a border is its mirror image.
    rows, columns = SIDE - np.abs(places % (2 * SIDE) - SIDE)
    turns = np.radians(random.uniform(-_TURN, _TURN, shape)) * times
    angles = random.uniform(0, 2 * np.pi, shape) + turns
    phases = random.uniform(0, 2 * np.pi, shape) + random.uniform(0.2, 0.8, shape) * times
    sizes = random.uniform(*_SIZES, shape) * (1 + _SWING * np.sin(phases))
    return Motion(rows, columns, angles, sizes)


def render(cutouts: Tensor, motion: Motion) -> np.ndarray:
    """Clips of emoji on white.

    Args:
        cutouts: Of `cut_out`, `[clips, objects, 4, height, width]`.
        motion: Of as many clips.

    Returns:
        uint8 `[clips, frames, side, side, 3]`.
    """
    canvas = torch.ones(len(cutouts) * FRAMES, 3, SIDE, SIDE)
    for number in range(cutouts.shape[1]):
        sprite = cutouts[:, number].repeat_interleave(FRAMES, dim=0)
        rows, columns, angles, sizes = (
            torch.from_numpy(x[:, number].reshape(-1)).float()
            for x in (motion.rows, motion.columns, motion.angles, motion.sizes)
        )
        # Maps a pixel to the position in the sprite that it shows, both in [-1, 1].
        zoom, cos, sin = SIDE / sizes, angles.cos(), angles.sin()
        x, y = 2 * columns / SIDE - 1, 2 * rows / SIDE - 1
        linear = torch.stack([cos, sin, -sin, cos], dim=-1).unflatten(-1, (2, 2))
        linear = zoom[:, None, None] * linear
        shift = -linear @ torch.stack([x, y], dim=-1)[..., None]
        grid = F.affine_grid(torch.cat([linear, shift], dim=-1), list(canvas.shape), False)
        shown = F.grid_sample(sprite, grid, align_corners=False)
        canvas = shown[:, :3] + (1 - shown[:, 3:]) * canvas
    pixels = (canvas * 255).round().clamp(0, 255).byte().movedim(1, -1)
    return pixels.unflatten(0, (-1, FRAMES)).numpy()


def make_clips(
    images: np.ndarray, labels: np.ndarray, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Clips of these emoji, classes as frequent as among them.

    Args:
        images: uint8 `[emoji, height, width, 3]`.
        labels: int64 `[emoji]`.
        count: Clips.
        seed: Fixes them.

    Returns:
        Mosaics, uint8 `[count, 96, 96, 3]`; int64 `[count]`.
    """
    random = np.random.default_rng(seed)
    cutouts = cut_out(images)
    classes = labels[random.integers(0, len(labels), count)]
    members = {c: np.flatnonzero(labels == c) for c in np.unique(labels)}
    chosen = np.stack([random.choice(members[c], _OBJECTS) for c in classes])
    motion = draw_motion(count, random)
    parts = []
    for start in range(0, count, _BATCH):
        part = slice(start, start + _BATCH)
        moving = Motion(**{name: value[part] for name, value in vars(motion).items()})
        parts.append(render(cutouts[torch.from_numpy(chosen[part])], moving))
    frames = np.concatenate(parts).reshape(count, COLUMNS, COLUMNS, SIDE, SIDE, 3)
    return frames.swapaxes(2, 3).reshape(count, COLUMNS * SIDE, COLUMNS * SIDE, 3), classes


def make_data(
    images: np.ndarray,
    labels: np.ndarray,
    held_out: np.ndarray,
    num_train: int,
    num_held_out: int,
) -> dict[str, np.ndarray]:
    """Clips to train on and, after them, held-out ones.

    Args:
        images: uint8 `[emoji, height, width, 3]`.
        labels: int64 `[emoji]`.
        held_out: bool `[emoji]`; which are seen in held-out clips only.
        num_train: Clips to train on.
        num_held_out: Clips that are held out.

    Returns:
        `arr_0`, `labels` and `num_train`, as the file has them.
    """
    parts = [
        make_clips(images[chosen], labels[chosen], count, seed)
        for seed, (chosen, count) in enumerate(((~held_out, num_train), (held_out, num_held_out)))
    ]
    clips, classes = (np.concatenate(both) for both in zip(*parts, strict=True))
    return {"arr_0": clips, "labels": classes, "num_train": np.array(num_train)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("emoji", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=6144)
    parser.add_argument("--held-out", type=int, default=256)
    options = parser.parse_args(arguments)
    with np.load(options.emoji, allow_pickle=False) as arrays:
        images, labels, classes = arrays["arr_0"], arrays["labels"], arrays["classes"]
    held_out = np.arange(len(images)) % _HELD_OUT == _HELD_OUT - 1
    made = make_data(images, labels, held_out, options.clips, options.held_out)
    with written_whole(options.out) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **made, classes=classes)
    print(f"wrote {options.clips} clips and {options.held_out} held-out ones")


if __name__ == "__main__":
    main()
