"""Training speed of Wan: whole steps of the loop, on random latents of clips with captions.

    torchrun --nproc-per-node 8 benchmarks/wan_speed.py wan.json --parallelism fsdp

Like train_speed.py for DiTs: forward and backward pass in bfloat16, clipping, AdamW and the
average of the weights; one clip per GPU. Settings of MHLA may follow its name.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from rows import machine
from sharing import Alone, FailedElsewhereError, turns
from steps import RandomSamples, attention_kernel, fresh, timed
from train_speed import build_on_device

from mhla_gen.config import MHLAConfig, ModelConfig, TrainConfig, WanConfig, load_config
from mhla_gen.data import Batch
from mhla_gen.files import write_json
from mhla_gen.runtime.processes import part_processes
from mhla_gen.training.training_run import build_run

_CHANNELS, _TEXT_LENGTH, _TEXT_DIM = 16, 512, 4096


@dataclass(frozen=True)
class RandomClips(RandomSamples):
    """Latents of clips, with embedded captions of UMT5's size."""

    num_classes: int = 0
    count: int = 16

    @cached_property
    def empty_prompt_embeds(self) -> torch.Tensor:
        """The embedded empty caption."""
        return torch.randn(_TEXT_LENGTH, _TEXT_DIM, device="cpu")

    def read(self, indices: Sequence[int]) -> Batch:
        """A batch, in which all clips have the same caption."""
        captions = self.empty_prompt_embeds.expand(len(indices), -1, -1)
        return {
            "samples": self.samples[torch.tensor(indices, device="cpu")],
            "prompt_embeds": captions,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the requested kinds of attention, and write the results after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="1.3B")
    parser.add_argument(
        "--clip", type=int, nargs=3, default=[81, 480, 832], help="frames and sides"
    )
    parser.add_argument("--attention", nargs="+", default=["softmax", "mhla", "mhla exact=0.05"])
    parser.add_argument("--parallelism", default="fsdp", choices=["ddp", "fsdp"])
    parser.add_argument("--compile", default="regional")
    parser.add_argument(
        "--gradient-checkpointing",
        type=yaml.safe_load,
        nargs="+",
        default=[True],
        help="true, selective, a share of the blocks, or false",
    )
    parser.add_argument("--num-layers", type=int, help="blocks, in place of the model's own")
    parser.add_argument("--tiny", action="store_true", help="a narrow model, to try the script")
    parser.add_argument("--seconds", type=float, default=6.0, help="measured time of a row")
    parser.add_argument("--profile", action="store_true", help="list the longest kernels")
    parser.add_argument("--locks", nargs="*", default=[], help="see sharing.turns")
    options = parser.parse_args(arguments)
    PartialState(cpu=not torch.cuda.is_available())
    found: list[dict[str, Any]] = []
    for attention, recomputed in product(options.attention, options.gradient_checkpointing):
        with turns(*options.locks) as alone, fresh(), attention_kernel(attention):
            result = measure(attention, recomputed, options, alone)
        if PartialState().is_main_process:
            found.append(result)
            write_json(options.out, {**machine(), "rows": found}, indent=1)
            print(json.dumps({k: v for k, v in result.items() if k != "kernels"}), flush=True)
    part_processes()


def measure(
    attention: str, recomputed: Any, options: argparse.Namespace, alone: Alone
) -> dict[str, Any]:
    """Build the run and time its steps."""
    name, *settings = attention.split()
    processes = PartialState().num_processes
    frames, height, width = options.clip
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32}
    config = TrainConfig(
        output_dir="unused",
        model=ModelConfig(
            attention=name,  # type: ignore[arg-type]
            mhla=load_config(None, settings, MHLAConfig),
        ),
        wan=WanConfig(
            preset=options.preset,
            num_layers=options.num_layers,
            **(small if options.tiny else {}),
        ),
        batch_size=processes,
        learning_rate=1e-5,
        parallelism=options.parallelism if processes > 1 else "ddp",
        compile=options.compile,
        gradient_checkpointing=recomputed,
        report_to="none",
    )
    shape = (_CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8)
    named = {
        "model": f"Wan-{options.preset}",
        "clip": options.clip,
        "attention": attention,
        "parallelism": config.parallelism,
        "devices": processes,
        "gradient_checkpointing": recomputed,
    }
    try:
        return named | timed(build_run(config, build_on_device, RandomClips(shape)), options, alone)
    except torch.OutOfMemoryError:
        return named | {"error": "out of memory"}
    except FailedElsewhereError as error:
        return named | {"error": str(error)}


if __name__ == "__main__":
    main()
