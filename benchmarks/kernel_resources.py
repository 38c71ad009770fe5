"""Registers, spills, shared memory and waits of the Triton kernels, without a GPU.

    python benchmarks/kernel_resources.py [--capability 90] [--only WORD]

Compiles every kernel launched by a forward and backward pass, at shapes of image and video models,
for a GPU that need not be present, and reads the machine code (bfloat16). `programs` is the number
of programs that fit on a Hopper multiprocessor. `waits` counts the places where a program waits for
its matrix products (wgmma), and `in line` those between two products: a loop with many of them
computes one product after the other, usually because an operand is in registers. Spilled registers
are costly inside loops; `spills` does not tell where they are. For times, see
benchmarks/kernel_speed.py and tile_kernels.py.
"""

import argparse
import importlib
import math
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from mhla_gen import ops
from mhla_gen.bench.ops import Case
from mhla_gen.ops import auto_tiles, kernels, locality_mixing, mhla, tile_attention

CASES = (
    Case(8, 4, (16, 16), 72, (4, 4), False),
    Case(2, 2, (32, 32), 72, (4, 4), False),
    Case(1, 2, (64, 64), 64, (8, 8), False),
    Case(1, 2, (9, 32, 32), 128, (3, 4, 8), True),
    Case(1, 2, (21, 30, 50), 128, (3, 5, 10), True),
)
SHARES = (0.05, 0.125)
_TOOLS = Path(nvidia.__file__).parent / "bin"
# Limits of a Hopper multiprocessor: registers, bytes of shared memory, programs, warps.
_REGISTERS, _SHARED, _PROGRAMS, _WARPS = 65536, 227 * 1024, 32, 64


class AbsentCard:
    """The parts of a Triton driver that compilation needs."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Index of the device."""
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        """The stream, which is not used."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Device of the tensors."""
        return torch.device("cpu")


def examine(compiled: Any, num_warps: int) -> dict[str, Any]:
    """Figures from a kernel's machine code."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", binary)
        code = _run("nvdisasm", "-c", binary)
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # pyright: ignore[reportOptionalSubscript]
    events = "".join(
        {"H": "p", "W": "w"}[name[0]] for name in re.findall(r"HGMMA|WARPGROUP\.DEPBAR", code)
    )
    shared = compiled.metadata.shared
    return {
        "registers": registers,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared": shared,
        "warps": num_warps,
        "programs": min(
            _REGISTERS // (registers * 32 * num_warps),
            _SHARED // (shared + 1024),
            _PROGRAMS,
            _WARPS // num_warps,
        ),
        "wgmma": events.count("p"),
        "mma": len(re.findall(r"\bHMMA", code)),
        "waits": events.count("w"),
        "in line": len(re.findall(r"pw(?=p)", events)),
    }


def _run(tool: str, *arguments: Any) -> str:
    command = [str(_TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


def watch(report: Callable[[str, dict[str, Any]], None], only: str) -> None:
    """Compile instead of launching, and report each kernel once."""
    from mhla_gen.ops.kernels import compiled

    seen: set[str] = set()
    ordinary = compiled.launch

    def launch(kernel: Any, grid: Any, tensors: Any, scalars: Any, constants: Any) -> None:
        name = kernel.fn.__name__
        key = f"{name} {[t is None for t in tensors]} {constants}"
        if key in seen or only not in name:
            return
        seen.add(key)
        given = [MockTensor(t.dtype) if isinstance(t, torch.Tensor) else t for t in tensors]
        made = kernel.warmup(*given, *scalars, grid=grid, **constants)
        report(name, examine(made, constants.get("num_warps", 4)))

    for package in (kernels, ops):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            if getattr(module, "launch", None) is ordinary:
                module.launch = launch  # pyright: ignore[reportAttributeAccessIssue]
            if hasattr(module, "INTERPRETED"):
                # Tensors on the CPU pass the checks, as with interpreted kernels.
                module.INTERPRETED = True  # pyright: ignore[reportAttributeAccessIssue]


def passes(case: Case) -> None:
    """Run everything that launches kernels at one shape."""
    tokens, dim = math.prod(case.grid), case.head_dim
    inputs = [
        torch.randn(case.batch, tokens, case.heads, dim, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    angles = torch.rand(tokens, dim // 2)
    common: dict[str, Any] = {
        "grid": case.grid,
        "rotary": (angles.cos(), angles.sin()) if case.rotary else None,
        "implementation": "fused",
    }
    mixing = locality_mixing(case.layout).requires_grad_()
    query, key, value = inputs
    out = mhla(query, key, value, mixing, layout=case.layout, **common)
    torch.autograd.grad(out.float().sum(), [*inputs, mixing])
    for share in SHARES:
        layout = auto_tiles(case.grid, share)._asdict()
        near, _ = tile_attention(query, key, value, **common, **layout)
        torch.autograd.grad(near.float().sum(), inputs)


def main() -> None:
    """Print one line per kernel and shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--only", default="", metavar="WORD", help="kernels with it in their name")
    options = parser.parse_args()
    driver.set_active(AbsentCard(options.capability))  # pyright: ignore[reportArgumentType]

    def report(name: str, found: dict[str, Any]) -> None:
        print(f"{name:32}", *(f"{key} {value}" for key, value in found.items()), flush=True)

    watch(report, options.only)
    print(f"triton {triton.__version__}, sm_{options.capability}")
    for case in CASES:
        print(f"{list(case.grid)} head_dim {case.head_dim}")
        passes(case)


if __name__ == "__main__":
    main()
