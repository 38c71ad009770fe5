"""Emoji with captions that a small text encoder of random weights has embedded."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5Config, T5EncoderModel

EVERY = 16
"""One image in so many is held out."""
WIDTH = 64
"""Channels of an embedded caption."""


class CaptionedEmoji:
    """Images with embedded captions; see `mhla_gen.data.TrainingData`."""

    class_names = None
    empty_prompt: dict[str, Tensor]

    def __init__(self, path: Path, limit: int, side: int, frames: bool):
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"][: limit or None], arrays["labels"][: limit or None]
            names = [str(name) for name in arrays["classes"]]
        self.captions = [f"an emoji of {' drawn as '.join(n.split('/'))}".lower() for n in names]
        rows = embedded([*self.captions, ""])
        self.empty_prompt = {name: values[-1] for name, values in rows.items()}
        self._text = {name: values[:-1] for name, values in rows.items()}
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels = F.interpolate(pixels, (side, side), mode="area")
        self._pixels = pixels.unsqueeze(2) if frames else pixels
        self.labels = torch.from_numpy(labels)
        number = torch.arange(len(images))
        self.held_out = number[number % EVERY == EVERY - 1]
        self.buckets = (number[number % EVERY != EVERY - 1].tolist(),)
        self.sample_shapes = (tuple(self._pixels.shape[1:]),)

    def __len__(self) -> int:
        return len(self.buckets[0])

    def read(self, indices: Any) -> dict[str, Tensor]:
        """Images in [-1, 1] and the tensors of their captions."""
        indices = torch.as_tensor(indices)
        return {"samples": self._pixels[indices], **self.text_of(self.labels[indices])}

    def text_of(self, labels: Tensor) -> dict[str, Tensor]:
        """The tensors of the captions of some classes."""
        return {name: values[labels] for name, values in self._text.items()}

    def describe(self, index: int) -> str:
        """See `TrainingData`."""
        return f"image {index}"


@torch.no_grad()
def embedded(captions: list[str]) -> dict[str, Tensor]:
    """`prompt_embeds` of words, padded with zeros, and their mean, by a T5 of random weights."""
    words = sorted({word for caption in captions for word in caption.split()})
    numbers = {word: i + 1 for i, word in enumerate(words)}
    length = max(len(caption.split()) for caption in captions)
    ids = torch.zeros(len(captions), length, dtype=torch.int64)
    for row, caption in zip(ids, captions, strict=True):
        for place, word in enumerate(caption.split()):
            row[place] = numbers[word]
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words) + 1, "d_model": WIDTH, "d_kv": 16, "d_ff": 128}
    encoder = T5EncoderModel(T5Config(**sizes, num_layers=2, num_heads=4)).eval()
    valid = (ids > 0).float()
    # The empty caption has one valid token: that of padding.
    valid[:, 0] = 1
    states = encoder(ids, valid).last_hidden_state * valid[..., None]
    pooled = states.sum(1) / valid.sum(1, keepdim=True)
    return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
