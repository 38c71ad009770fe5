"""Gradients of a compiled Wan block, as `train` compiles it and as torch does by default.

    python experiments/modulation_gradients.py OUT.json

From 4,096 tokens on, torch may compile a kernel that normalises tokens and adds them up, and that
leaves a part of the modulation's gradient unwritten (`mhla_gen/runtime/compiling.py`). Errors are
relative to the largest gradient without compilation; those of sums of thousands of tokens in
float32 stay far below 3e-4, the bound of the same test on a GPU (`tests/test_compiling.py`).
`--small` tries the script without a GPU: there torch has no such kernel.
"""

import argparse
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from mhla_gen import MHLAConfig, inject
from mhla_gen.files import write_json
from mhla_gen.runtime.compiling import compile_model
from mhla_gen.runtime.devices import device_name

_BOUND = 3e-4


def as_train(model: WanTransformer3DModel) -> None:
    """Compile as `train compile=regional` does."""
    compile_model(model, "regional")


def as_torch(model: WanTransformer3DModel) -> None:
    """Compile with torch's defaults."""
    model.compile_repeated_blocks(fullgraph=True, dynamic=False)


def gradients(
    attention: str, compile_blocks: Callable[[Any], None], size: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Gradients of all weights at the second step, of one layer of 10 heads and one clip."""
    torch.compiler.reset()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = WanTransformer3DModel(
            num_layers=1,
            num_attention_heads=10,
            attention_head_dim=64,
            ffn_dim=32,
            text_dim=16,
            freq_dim=16,
        )
        if attention == "mhla":
            inject(model, MHLAConfig(layout=(2, 2, 3)))
        latents, text = torch.randn(1, 16, *size), torch.randn(1, 7, 16)
        time = torch.tensor([3])
    compile_blocks(model)
    for _ in range(2):
        model.zero_grad()
        model(latents, time, text, return_dict=False)[0].square().mean().backward()
    named = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return {name: gradient for name, gradient in named if gradient is not None}


def main() -> None:
    """Compare both ways for softmax and MHLA, and write all errors beyond the bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="few tokens, to try the script")
    options = parser.parse_args()
    size = (2, 8, 8) if options.small else (4, 128, 64)
    rows = []
    for attention in ("softmax", "mhla"):
        expected = gradients(attention, lambda model: None, size)
        largest = max(x.abs().max() for x in expected.values())
        row: dict[str, Any] = {"attention": attention}
        for how in (as_train, as_torch):
            found = gradients(attention, how, size)
            errors = {n: ((found[n] - x).abs().max() / largest).item() for n, x in expected.items()}
            worst = max(errors, key=errors.__getitem__)
            wrong = [name for name, error in errors.items() if not error <= _BOUND]
            row[how.__name__] = {"largest_error": errors[worst], "of": worst, "wrong": wrong}
        rows.append(row)
        print(row, flush=True)
    facts = {"date": f"{date.today()}", "device": device_name(), "torch": torch.__version__}
    write_json(options.out, facts | {"rows": rows}, indent=1)


if __name__ == "__main__":
    main()
