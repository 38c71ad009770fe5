"""Does the installation work? Each part is tried once, and what fails comes with its remedy."""

import functools
import importlib.metadata
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from packaging.requirements import Requirement

from mhla_gen.config import FeaturesConfig
from mhla_gen.ops import linear_attention, locality_mixing, mhla
from mhla_gen.version import __version__

State = Literal["ok", "absent", "broken"]


class Finding(NamedTuple):
    """What one check found."""

    name: str
    state: State
    """absent is fine: something optional is not there."""
    detail: str
    remedy: str = ""


def examine(names: Sequence[str] = ()) -> list[Finding]:
    """Run the named checks, or all of them.

    Raises:
        ValueError: If there is no check of a name.
    """
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise ValueError(f"checks must be among {', '.join(CHECKS)}; found {', '.join(unknown)}")
    return [_guarded(name, CHECKS[name]) for name in names or CHECKS]


def report(findings: list[Finding]) -> str:
    """Findings as a table, remedies below their row."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<7} {finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<7} {'':<{width}}  → {finding.remedy}")
    return "\n".join(lines)


def _guarded(name: str, check: Callable[[], tuple[State, str, str]]) -> Finding:
    # A check tries foreign code on an unknown machine: whatever it raises is the finding.
    try:
        return Finding(name, *check())
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return Finding(name, "broken", f"{type(error).__name__}: {first}", REMEDIES.get(name, ""))


def check_versions() -> tuple[State, str, str]:
    """Are the packages that we need there, in versions that we need?"""
    system = f"mhla_gen {__version__}, Python {platform.python_version()}, {platform.platform()}"
    wrong = []
    for text in importlib.metadata.requires("mhla_gen") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, needs {requirement.specifier}")
    if wrong:
        return (
            "broken",
            f"{system}: {'; '.join(wrong)}",
            f"{sys.executable} -m pip install mhla_gen",
        )
    names = ("torch", "diffusers", "accelerate", "transformers", "omegaconf")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return "ok", f"{system}; {versions}", ""


def check_operator() -> tuple[State, str, str]:
    """Does the batched operator equal its definition on this processor?"""
    error = _operator_error("cpu", "blockwise", torch.float64)
    if error > 1e-10:
        return "broken", f"blockwise differs from the definition by {error:.1e}", ""
    return "ok", f"blockwise equals the definition on the CPU (relative error {error:.0e})", ""


def check_gpu() -> tuple[State, str, str]:
    """Which GPUs does torch see?"""
    if not torch.cuda.is_available():
        return "absent", "torch sees no CUDA device; everything runs on the CPU", ""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return "ok", f"{len(names)} × {names[0]}, CUDA {torch.version.cuda}", ""


def check_kernels() -> tuple[State, str, str]:
    """Do the fused kernels compile and equal the definition?"""
    if not torch.cuda.is_available():
        return "absent", "fused kernels need CUDA; implementation=auto takes blockwise", ""
    error = _operator_error("cuda", "fused", torch.float32)
    if error > 1e-2:
        return "broken", f"fused differs from the definition by {error:.1e}", ""
    return "ok", f"fused equals the definition (relative error {error:.0e}); auto takes it", ""


def check_conversion() -> tuple[State, str, str]:
    """Does a diffusers model convert, run, save, load and convert back?"""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    from mhla_gen.models import MHLADiTTransformer2DModel, inject, restore

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=2,
        norm_num_groups=4,
    ).eval()
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.tensor([0])
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        before = model(*inputs).sample
        converted = inject(model)(*inputs).sample
        model.save_pretrained(folder)
        loaded = MHLADiTTransformer2DModel.from_pretrained(folder)(*inputs).sample
        same = torch.equal(loaded, converted) and torch.equal(
            restore(model)(*inputs).sample, before
        )
    if not same:
        return "broken", "a converted DiT does not come back as it was saved", ""
    return "ok", "a tiny DiT converts, saves, loads and converts back exactly", ""


def check_compile() -> tuple[State, str, str]:
    """Does torch.compile build code here?"""
    compiled = torch.compile(linear_attention, fullgraph=True)
    inputs = torch.randn(3, 1, 16, 2, 8)
    torch.testing.assert_close(compiled(*inputs), linear_attention(*inputs))
    return "ok", "torch.compile runs the operator", ""


def check_video() -> tuple[State, str, str]:
    """Can a clip be written as mp4 and read back?"""
    import imageio

    from mhla_gen.evaluation.video import ClipRule, read_clip

    frames = np.stack([np.full((32, 32, 3), 20 * i, dtype=np.uint8) for i in range(10)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        imageio.mimwrite(path, list(frames), fps=8, macro_block_size=16)
        read = read_clip(path, ClipRule(frames=10))
    if read.shape != frames.shape or np.abs(read.astype(int) - frames).mean() > 8:
        return "broken", "frames read back differ from those written", REMEDIES["video"]
    return "ok", "mp4 encodes (imageio-ffmpeg) and decodes (decord), frames in order", ""


def check_inception() -> tuple[State, str, str]:
    """Are the weights of FID's network on this machine?"""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]
    if path.is_file():
        return "ok", f"Inception weights in {path}", ""
    return (
        "absent",
        "Inception weights are not here yet",
        f"`mhla-gen evaluate` fetches them once; offline, put the file at {path} or set "
        "features.weights",
    )


def check_caches() -> tuple[State, str, str]:
    """Can the folders be written where weights and features are kept?"""
    from huggingface_hub import constants

    folders = {
        "models of the hub": (Path(constants.HF_HUB_CACHE), "HF_HUB_CACHE"),
        "other weights": (Path(torch.hub.get_dir()), "TORCH_HOME"),
        "features": (Path(FeaturesConfig().cache_dir).expanduser(), "features.cache_dir"),
    }
    closed = []
    for what, (folder, setting) in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"once")
        except OSError as error:
            closed.append(f"{what} in {folder}: {error.strerror}; set {setting} to another folder")
    if closed:
        return "broken", "cannot write " + " and ".join(c.split(";")[0] for c in closed), closed[0]
    return "ok", "writable: " + ", ".join(str(folder) for folder, _ in folders.values()), ""


def _operator_error(device: str, implementation: str, dtype: torch.dtype) -> float:
    query, key, value = torch.randn(3, 1, 35, 2, 32, device=device, dtype=dtype)
    run = functools.partial(mhla, grid=(5, 7), layout=(2, 3))
    mixing = locality_mixing((2, 3)).to(device)
    out = run(query, key, value, mixing, implementation=implementation)
    doubles = (x.double() for x in (query, key, value, mixing))
    expected = run(*doubles, implementation="naive")
    return float((out.double() - expected).norm() / expected.norm())


CHECKS: dict[str, Callable[[], tuple[State, str, str]]] = {
    "packages": check_versions,
    "operator": check_operator,
    "GPU": check_gpu,
    "kernels": check_kernels,
    "conversion": check_conversion,
    "compile": check_compile,
    "video": check_video,
    "inception": check_inception,
    "caches": check_caches,
}

# What usually helps when a check raises.
REMEDIES = {
    "GPU": "install a torch build that fits the driver: https://pytorch.org/get-started/locally",
    "kernels": "use implementation=blockwise; Triton needs a C compiler and a GPU from Volta on",
    "compile": "install a C++ compiler (g++ or clang), or leave compile off: nothing needs it",
    "video": "reinstall decord2 and imageio-ffmpeg, which bring their own FFmpeg",
    "inception": "reinstall torch-fidelity",
}
