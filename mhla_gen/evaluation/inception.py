"""The Inception network of FID: torch-fidelity's, with its TF1 resize and sFID's features."""

import copy
import io
from pathlib import Path
from typing import Any, cast
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingTypeStubs]
    URL_INCEPTION_V3,
    BasicConv2d,
    FeatureExtractorInceptionV3,
)

from mhla_gen.errors import one_line
from mhla_gen.evaluation.errors import EvaluationError
from mhla_gen.evaluation.extractor import Extractor, ExtractorIdentity
from mhla_gen.files.digests import file_digest
from mhla_gen.files.saved import NO_STATE

# The released file's SHA-256 starts with the digits in its name, as torch.hub checks them too.
OFFICIAL_SHA256_PREFIX = "6726825d"
SPATIAL_CHANNELS = 7
DIMS = {"pool": 2048, "spatial": SPATIAL_CHANNELS * 17 * 17, "logits": 1008}


class InceptionExtractor(Extractor):
    """`pool` for FID, `spatial` for sFID, `logits` (without the bias) for the Inception score.

    `spatial` is ADM's `mixed_6/conv`: the first 7 channels of `Mixed_6d.branch1x1` after
    normalisation and ReLU, 17 × 17, flattened with the channels last.

    Args:
        weights: State dict file; None uses the released one, downloaded once.
        dtype: Arithmetic inside the network.

    Raises:
        EvaluationError: If the weights are missing, unreachable, damaged or another network's.

    Source:
        Dhariwal and Nichol 2021, arXiv:2105.05233, the evaluator of their released code.
    """

    def __init__(self, weights: str | Path | None = None, dtype: torch.dtype = torch.float32):
        path = find_weights() if weights is None else Path(weights)
        state = load_tensors(path)
        sha256 = file_digest(path)
        official = sha256.startswith(OFFICIAL_SHA256_PREFIX)
        name = "inception-2015-12-05" if official else f"inception-{sha256[:8]}"
        precision = "fp64" if dtype == torch.float64 else "fp32"
        super().__init__(ExtractorIdentity(name, sha256, "tf1-resize", precision), DIMS)
        self.network = _build_network(state, path, dtype)
        if dtype == torch.float32:
            fuse_convolutions(self.network)
        self._spatial: Tensor | None = None
        branch = self.network.get_submodule("Mixed_6d.branch1x1")
        branch.register_forward_hook(self._keep_spatial)
        self.requires_grad_(False).eval()

    def _keep_spatial(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """See `Extractor`."""
        pool, logits = self.network(images)
        spatial, self._spatial = self._spatial, None
        assert spatial is not None
        flat = spatial.permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": flat, "logits": logits}


def find_weights(folder: str | Path | None = None) -> Path:
    """The released weights: in torch.hub's folder, or downloaded to it with progress and checksum.

    Args:
        folder: Where to look; by default torch.hub's checkpoints, which torch-fidelity shares.

    Raises:
        EvaluationError: If they are damaged, or not there and cannot be downloaded.
    """
    folder = Path(folder) if folder else Path(torch.hub.get_dir(), "checkpoints")
    path = folder / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if path.is_file():
        if not file_digest(path).startswith(OFFICIAL_SHA256_PREFIX):
            raise EvaluationError(
                f"{path} is not the released file (its SHA-256 does not start with "
                f"{OFFICIAL_SHA256_PREFIX}); remove it to fetch it again, or name other weights "
                "with features.weights=PATH"
            )
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), OFFICIAL_SHA256_PREFIX)
    except (URLError, OSError, RuntimeError) as error:
        raise EvaluationError(
            f"the Inception weights are not at {path} and could not be downloaded "
            f"({error}); fetch {URL_INCEPTION_V3} elsewhere and pass features.weights=PATH"
        ) from error
    return path


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """A state dict; the file may hold tensors only, nothing that runs when read.

    Raises:
        EvaluationError: If the file is missing, damaged or holds something else.
    """
    try:
        found: object = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise EvaluationError(f"weights file {path} does not exist") from None
    except (*NO_STATE, OSError) as error:
        reason = one_line(str(error).partition("\n")[0] or type(error).__name__, 200)
        raise EvaluationError(
            f"{path} is damaged or not a plain state dict ({reason}); download it again"
        ) from error
    state = cast(dict[str, Any], found)
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise EvaluationError(f"{path} must hold a state dict of tensors")
    return state


def _build_network(state: dict[str, Tensor], path: Path, dtype: torch.dtype) -> nn.Module:
    # torch-fidelity unpickles the file it is given, so it is given tensors that we wrote.
    clean = io.BytesIO()
    torch.save(state, clean)
    clean.seek(0)
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=clean,
            feature_extractor_internal_dtype=str(dtype).removeprefix("torch."),
        )
    except RuntimeError as error:
        raise EvaluationError(
            f"{path} holds the weights of another network than inception-v3-compat "
            f"({' '.join(str(error).split())[:120]}…)"
        ) from error


class FusedConvolution(nn.Module):
    """Convolution, batch norm and ReLU; on a CUDA device one cuDNN call with the norm folded in.

    Folding changes features by 4e-7 of their size and makes the network 14 % faster on an H100
    (docs/evaluation.md). Elsewhere the three run one after the other, as in torch-fidelity.

    Args:
        conv: Convolution without a bias.
        bn: Its norm, in evaluation mode.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d):
        super().__init__()
        self.conv, self.bn = conv, bn
        folded = fuse_conv_bn_eval(copy.deepcopy(conv).double(), copy.deepcopy(bn).double())
        assert folded.bias is not None
        self.register_buffer("weight", folded.weight.detach().float(), persistent=False)
        self.register_buffer("bias", folded.bias.detach().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features [batch, channels, height, width] → the same, at least 0."""
        if not x.is_cuda or torch.version.hip:
            return functional.relu(self.bn(self.conv(x)), inplace=True)
        stride, padding, dilation = self.conv.stride, self.conv.padding, self.conv.dilation
        assert not isinstance(padding, str)
        return torch.cudnn_convolution_relu(
            x, self.weight, self.bias, stride, padding, dilation, self.conv.groups
        )


def fuse_convolutions(network: nn.Module) -> None:
    """Replace every block of convolution, norm and ReLU by a `FusedConvolution`, in place."""
    for parent in list(network.modules()):
        for name, block in list(parent.named_children()):
            if isinstance(block, BasicConv2d):
                setattr(parent, name, FusedConvolution(block.conv, block.bn))


class _Unloaded(FeatureExtractorInceptionV3):
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the initial weights: the file that the constructor reads is empty."""


def write_random_weights(path: str | Path, seed: int = 0) -> None:
    """Write random weights in the released file's layout: for tests and for timing, offline.

    Args:
        path: State dict file to write.
        seed: Fixes the weights.
    """
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    random = cast(Any, torch.random)  # Its functions have no types.
    with random.fork_rng(devices=[]):
        random.manual_seed(seed)
        network = _Unloaded("random", ["2048"], feature_extractor_weights_path=empty)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
