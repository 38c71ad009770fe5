"""Kernels touch no memory outside their tensors, not even where they do not use what they read."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform == "win32",
    reason="needs kernels in the interpreter, and pages that can be protected",
)
FOLDER = Path(__file__).parent
# All kernels, forward and backward, at odd sizes.
FILES = [f"test_{name}.py" for name in ("tile_fused", "fused", "causal_fused", "gated_conv")]
FILES += ["test_depthwise.py"]
FEW = [
    "test_tile_fused.py::test_fused_equals_definition[3]",
    "test_fused.py::test_ragged_video_with_rotary[dtype1-linear]",
    "test_fused.py::test_ragged_video_with_rotary[dtype1-attention]",
    "test_causal_fused.py::test_lengths_and_blocks[53-3-dtype4]",
    "test_gated_conv.py::test_one_pass_equals_the_definition[case1-head-True]",
]
CARELESS = """
import sys, torch, triton, triton.language as tl, guard_pages

@triton.jit
def kernel(x_ptr, n, shift, MASKED: tl.constexpr):
    places = shift + tl.arange(0, 16)
    inside = (places >= 0) & (places < n)
    x = tl.load(x_ptr + places, mask=inside if MASKED else None)
    tl.store(x_ptr + places, x + 1, mask=inside)

x = torch.zeros(3, 5)[:, 1:4]
kernel[(1,)](x, 13, int(sys.argv[1]), True)
print(x.flatten().tolist(), flush=True)
kernel[(1,)](x, 13, int(sys.argv[1]), False)
"""


def run_guarded(where, *command):
    paths = os.pathsep.join([str(FOLDER), str(FOLDER.parent)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "GUARD": where, "PYTHONPATH": paths}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, *command]
    return subprocess.run(command, env=environment, cwd=FOLDER, capture_output=True, text=True)


@pytest.mark.parametrize(("where", "shift"), [("end", "0"), ("start", "-3")])
def test_an_access_outside_is_found(where, shift, tmp_path):
    script = tmp_path / "careless.py"
    script.write_text(CARELESS)
    result = run_guarded(where, script, shift)
    assert result.stdout.strip() == str([1.0] * 9), result.stderr
    assert result.returncode == -signal.SIGSEGV
    assert f'"{script}", line 8 in kernel' in result.stderr


@pytest.mark.parametrize(
    ("where", "tests"),
    [
        ("end", FEW),
        pytest.param("end", FILES, marks=pytest.mark.slow),
        pytest.param("start", FILES, marks=pytest.mark.slow),
    ],
)
def test_kernels_stay_inside_their_tensors(where, tests):
    options = ["-q", "-p", "guard_pages", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    result = run_guarded(where, "-m", "pytest", *options, *tests)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout
