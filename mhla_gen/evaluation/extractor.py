"""The base of all feature extractors: an identity, and named features in full float32."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mhla_gen.errors import UserError


@dataclass(frozen=True)
class ExtractorIdentity:
    """All that determines an extractor's numbers; sets are only comparable if it is equal."""

    name: str
    """Network and release, such as inception-2015-12-05."""
    weights: str
    """SHA-256 of the weights."""
    resize: str
    """How images reach the network's size, such as tf1-resize."""
    dtype: str
    """Arithmetic: fp32 or fp64, never TF32."""

    def __str__(self) -> str:
        return f"{self.name} {self.resize} {self.dtype}"


class Extractor(nn.Module):
    """A frozen network from uint8 images to named features."""

    identity: ExtractorIdentity
    dims: dict[str, int]
    """Feature name → dimensions."""

    def __init__(self, identity: ExtractorIdentity, dims: dict[str, int]):
        super().__init__()
        self.identity, self.dims = identity, dims

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            images: uint8 [batch, 3, height, width], or clips [batch, frames, 3, height, width].

        Returns:
            For each name in `dims`, float32 [batch, dim].
        """
        if images.dtype != torch.uint8:
            raise UserError(f"extractors take uint8 images in 0…255, found {images.dtype}")
        with torch.no_grad(), full_float32(images.device):
            return {name: x.to(torch.float32) for name, x in self.extract(images).items()}

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """The network itself; `forward` has checked and set the precision."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.parameters(), torch.empty(0)).device

    def train(self, mode: bool = True) -> "Extractor":
        """Stay in evaluation mode: a training loop that holds a metric must not change it."""
        return super().train(False)


@contextmanager
def full_float32(device: torch.device) -> Generator[None]:
    """Real float32 arithmetic inside: no TF32, no bfloat16 passes, no autocast.

    cuDNN may time its algorithms meanwhile; every setting is put back afterwards.
    """
    backends = cast(Any, torch.backends)  # Its modules set most of their names when they run.
    precision = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    before = [backend.fp32_precision for backend in precision]
    benchmark = torch.backends.cudnn.benchmark
    try:
        for backend in precision:
            backend.fp32_precision = "ieee"
        torch.backends.cudnn.benchmark = True
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, value in zip(precision, before, strict=True):
            backend.fp32_precision = value
        torch.backends.cudnn.benchmark = benchmark
