"""Checks that compute something: operators, kernels, compilation, conversion, video."""

import functools
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from mhla_gen.doctor.installation import Result
from mhla_gen.ops import linear_attention, locality_mixing, mhla
from mhla_gen.ops.depthwise import depthwise_conv
from mhla_gen.runtime.cuda_graphs import RecordedForward

VIDEO_REMEDY = "reinstall decord2 and imageio-ffmpeg, which bring their own FFmpeg"


def check_operator() -> Result:
    """Does the batched operator equal its definition on this processor?"""
    error = _operator_error("cpu", "blockwise", torch.float64)
    if error > 1e-10:
        return Result("broken", f"blockwise differs from the definition by {error:.1e}")
    return Result("ok", f"blockwise equals the definition on the CPU (relative error {error:.0e})")


def check_alignment() -> Result:
    """Does a product depend on the memory address of a weight?"""
    generator = torch.Generator().manual_seed(0)
    for size in (8, 24, 72, 128):
        weight = torch.randn(size, size, generator=generator)
        row = torch.randn(1, size, generator=generator)
        memory, found = torch.empty(size * size + 16), set()
        for offset in range(16):
            moved = memory[offset : offset + size * size].view(size, size).copy_(weight)
            found.add(torch.nn.functional.linear(row, moved).numpy().tobytes())
        if len(found) > 1:
            return Result(
                "absent",
                "products of one row depend on a weight's address in memory: a loaded model may "
                "differ from the saved one in its last bits",
                "commands set MKL_CBWR=AUTO,STRICT; set it before Python starts for your programs",
            )
    given = os.environ.get("MKL_CBWR")
    return Result(
        "ok",
        "products do not depend on where weights lie in memory"
        + (f" (MKL_CBWR={given})" if given else ""),
    )


def check_gpu() -> Result:
    """Which GPUs does torch see?"""
    if not torch.cuda.is_available():
        return Result("absent", "torch sees no CUDA device; everything runs on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Result("ok", f"{len(names)} × {names[0]}, CUDA {torch.version.cuda}")


def check_kernels() -> Result:
    """Do the fused kernels compile and equal the definition?"""
    if not torch.cuda.is_available():
        detail = "implementation=auto takes blockwise, and torch's convolution"
        return Result("absent", f"fused kernels need CUDA; {detail}")
    errors = {
        "operator": _operator_error("cuda", "fused", torch.float32),
        "convolution": _convolution_error(),
    }
    said = " and ".join(f"{name} ({error:.0e})" for name, error in errors.items())
    if max(errors.values()) > 1e-2:
        return Result("broken", f"fused kernels differ from their definition: {said}")
    return Result("ok", f"fused {said} equal their definition; auto takes them")


def check_softmax() -> Result:
    """Which implementation of softmax attention does torch choose?"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query = torch.randn(2, 16, 256, 64, device=device, dtype=dtype)
    taken = SDPBackend(torch._fused_sdp_choice(query, query, query)).name.lower()
    kind = str(dtype).removeprefix("torch.")
    said = f"torch takes {taken} for layers that stay softmax ({device}, {kind})"
    if taken == "cudnn_attention":
        return Result(
            "ok",
            f"{said}; with torch 2.11 on Hopper its backward pass may fault where a length is not "
            "a multiple of 128, or a model has several kinds of blocks: `train` avoids it; in "
            "other programs call torch.backends.cuda.enable_cudnn_sdp(False)",
        )
    return Result("ok", said)


@torch.no_grad()
def check_graphs() -> Result:
    """Are passes recorded as CUDA graphs, and do they repeat what they recorded?"""
    settings = "sample with compile=true, train a DiT with compile=regional"
    if not torch.cuda.is_available():
        return Result("absent", f"steps are recorded as CUDA graphs on a GPU only ({settings})")
    layer = torch.nn.Linear(64, 64, device="cuda")
    recorded = RecordedForward(layer)
    # The first calls are not recorded.
    for _ in range(4):
        inputs = torch.randn(8, 64, device="cuda")
        torch.testing.assert_close(recorded(inputs), layer(inputs))
    return Result("ok", f"a recorded CUDA graph repeats the pass ({settings})")


def check_conversion() -> Result:
    """Does a diffusers model convert, run, save, load and convert back?"""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    from mhla_gen.models import MHLADiTTransformer2DModel, inject, restore
    from mhla_gen.models.short import unmentioned

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=2,
        norm_num_groups=4,
    ).eval()
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.tensor([0])
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, unmentioned():
        before = model(*inputs).sample
        converted = inject(model)(*inputs).sample
        model.save_pretrained(folder)
        loaded = MHLADiTTransformer2DModel.from_pretrained(folder)(*inputs).sample
        same = torch.equal(loaded, converted) and torch.equal(
            restore(model)(*inputs).sample, before
        )
    if not same:
        return Result("broken", "a converted DiT does not come back as it was saved")
    return Result("ok", "a tiny DiT converts, saves, loads and converts back exactly")


def check_compile() -> Result:
    """Does torch.compile build code here?"""
    compiled = torch.compile(linear_attention, fullgraph=True)
    inputs = torch.randn(3, 1, 16, 2, 8)
    torch.testing.assert_close(compiled(*inputs), linear_attention(*inputs))
    return Result("ok", "torch.compile runs the operator")


def check_video() -> Result:
    """Can a clip be written as mp4 and read back?"""
    import imageio

    from mhla_gen.evaluation.video import ClipRule, read_clip

    frames = np.stack([np.full((32, 32, 3), 20 * i, dtype=np.uint8) for i in range(10)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        imageio.mimwrite(path, list(frames), fps=8, macro_block_size=16)
        read = read_clip(path, ClipRule(frames=10))
    if read.shape != frames.shape or np.abs(read.astype(int) - frames).mean() > 8:
        return Result("broken", "frames read back differ from those written", VIDEO_REMEDY)
    return Result("ok", "mp4 encodes (imageio-ffmpeg) and decodes (decord), frames in order")


def _operator_error(device: str, implementation: str, dtype: torch.dtype) -> float:
    query, key, value = torch.randn(3, 1, 35, 2, 32, device=device, dtype=dtype)
    run = functools.partial(mhla, grid=(5, 7), layout=(2, 3))
    mixing = locality_mixing((2, 3)).to(device)
    out = run(query, key, value, mixing, implementation=implementation)
    doubles = (x.double() for x in (query, key, value, mixing))
    expected = run(*doubles, implementation="naive")
    return _relative_error(out, expected)


def _convolution_error() -> float:
    tokens, weight, bias = (
        torch.randn(size, device="cuda") for size in ((1, 35, 64), (64, 1, 3, 3), (64,))
    )
    out, expected = (
        depthwise_conv(tokens, weight, bias, grid=(5, 7), implementation=name)
        for name in ("fused", "torch")
    )
    return _relative_error(out, expected)


def _relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())
