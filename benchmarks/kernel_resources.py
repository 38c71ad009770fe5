"""Registers, spills, shared memory and waits of the Triton kernels, without a GPU.

    python benchmarks/kernel_resources.py [--capability 90] [--only WORD]

Compiles every kernel that a pass forward and backward launches, at shapes of image and video
models, for a card that need not be there, and reads the machine code (bfloat16). `programs` is how
many fit on a multiprocessor of a Hopper card. `waits` counts where a program waits for its matrix
products (wgmma), `in line` how many of these come between two products: a loop that has many of
them computes one product after the other, most often because an operand comes from registers.
Spilled registers cost where a loop has them, which `spills` does not tell. Times come from
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
    Case(1, 2, (21, 30, 50), 128, (3, 5, 10), True),
)
SHARES = (0.05, 0.125)
_TOOLS = Path(nvidia.__file__).parent / "bin"
# Of a Hopper multiprocessor: registers, bytes of shared memory, programs, warps.
_REGISTERS, _SHARED, _PROGRAMS, _WARPS = 65536, 227 * 1024, 32, 64


class AbsentCard:
    """What Triton asks a driver for when it compiles."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """The card that code is for."""
        return self.target

    def get_current_device(self) -> int:
        """Its number."""
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        """None is used."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")


def examine(compiled: Any, num_warps: int) -> dict[str, Any]:
    """What the machine code of a kernel says."""
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
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def watch(report: Callable[[str, dict[str, Any]], None], only: str) -> None:
    """Compile in place of every launch, and report each kernel once."""
    from mhla_gen.ops.kernels import compiled

    seen: set[str] = set()
    ordinary = compiled.launch

    def launch(kernel: Any, grid: Any, tensors: Any, scalars: Any, constants: Any) -> None:
        name = kernel.fn.__name__
        key = f"{name} {[t is None for t in tensors]} {constants}"
        if key in seen or only not in name:
            return
        seen.add(key)
        given = [None if t is None else MockTensor(t.dtype) for t in tensors]
        made = kernel.warmup(*given, *scalars, grid=grid, **constants)
        report(name, examine(made, constants.get("num_warps", 4)))

    for package in (kernels, ops):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            if getattr(module, "launch", None) is ordinary:
                module.launch = launch  # pyright: ignore[reportAttributeAccessIssue]
            if hasattr(module, "INTERPRETED"):
                # Tensors of the CPU pass, as where kernels are interpreted.
                module.INTERPRETED = True  # pyright: ignore[reportAttributeAccessIssue]


def passes(case: Case) -> None:
    """Everything that is launched at one shape."""
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
    """Print one line a kernel and shape."""
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
