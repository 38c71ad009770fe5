"""Small models like Stable Diffusion 3 and Wan on captioned emoji: softmax, MHLA, 12.5 % exact.

    python experiments/captioned.py IMAGES OUT [--seconds 115] [key=value …]

IMAGES is the npz file of experiments/evidence/emoji_dataset.py. A caption names the category and
the drawing style of a class; it is embedded by a small T5 encoder with random weights that is not
trained, which is enough for 18 captions. Models see pixels, as 1,024 tokens of 2 × 2; the Wan-like
model sees an image as a clip of one frame. All arms of a model start from the same weights, see the
same images and noise in the same order, and are measured on the same held-out images (every
sixteenth) and noise. The control `gated_softmax` is softmax with MHLA's convolution and gate. Three
arms of the SD3-like model differ in how text is weighed against the image: see `ARMS`.

OUT gets captioned.json after every arm, captioned.md at the end, and samples of each arm; finished
arms are not trained again, and other settings need another OUT. `--seconds` stops between arms.
`--pixels`, `--layers`, `--heads`, `--steps`, `--sample-steps` and `--limit` make it small enough
for a CPU. key=value changes the training config, captioned.yaml.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from captioned_data import WIDTH, CaptionedEmoji
from PIL import Image
from torch import nn

from mhla_gen.config import TrainConfig, TransformerConfig, load_config
from mhla_gen.files import write_json, write_picture, write_text
from mhla_gen.files.digests import file_digest
from mhla_gen.outputs.folders import differing_values
from mhla_gen.runtime.devices import device_name
from mhla_gen.training.previews import tiled
from mhla_gen.training.randomness import step_randomness
from mhla_gen.training.training_run import Run, build_run

GUIDANCE = 2.5


class Arm(NamedTuple):
    """A model and its attention."""

    model: str
    attention: str
    settings: tuple[str, ...] = ()
    frozen: bool = False
    """Keep the weight of text at its initial value: the share of text among all tokens."""


ARMS = {
    "sd3-softmax": Arm("sd3", "softmax"),
    "sd3-gated-softmax": Arm("sd3", "gated_softmax"),
    "sd3-mhla": Arm("sd3", "mhla"),
    "sd3-exact-12": Arm("sd3", "mhla", ("exact=0.125",)),
    "wan-softmax": Arm("wan", "softmax"),
    "wan-gated-softmax": Arm("wan", "gated_softmax"),
    "wan-mhla": Arm("wan", "mhla"),
    "wan-exact-12": Arm("wan", "mhla", ("exact=0.125",)),
    # The share of text tokens, with nothing learned.
    "sd3-mhla-counts": Arm("sd3", "mhla", frozen=True),
}


def sizes_of(model: str, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Class and sizes of a model for pixels of emoji."""
    width = 64 * options.heads
    shared = {"in_channels": 3, "out_channels": 3, "num_layers": options.layers}
    shared |= {"num_attention_heads": options.heads, "attention_head_dim": 64}
    if model == "wan":
        own = {"ffn_dim": 4 * width, "text_dim": WIDTH, "freq_dim": 256}
        return "WanTransformer3DModel", shared | own
    own = {
        "sample_size": options.pixels,
        "patch_size": 2,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": width,
        "pooled_projection_dim": WIDTH,
        "pos_embed_max_size": 32,
        "qk_norm": "rms_norm",
    }
    return "SD3Transformer2DModel", shared | own


class Job:
    """One arm: its run and its measurements."""

    def __init__(self, arm: Arm, data: CaptionedEmoji, options: argparse.Namespace):
        self.arm, self.data = arm, data
        name, sizes = sizes_of(arm.model, options)
        config = Path(__file__).with_name("captioned.yaml")
        given = [f"model.attention={arm.attention}", f"max_steps={options.steps}"]
        given += [f"model.mhla.{setting}" for setting in arm.settings]
        if arm.model == "wan":
            given.append("model.mhla.layout=[1,4,4]")
        loaded: TrainConfig = load_config(config, [*given, *options.overrides], TrainConfig)
        transformer = TransformerConfig(name=name, sizes=sizes)
        self.config = replace(loaded, transformer=transformer)

    @cached_property
    def run(self) -> Run:
        """The model, its optimizer and data."""
        run = build_run(self.config, data=self.data)
        if self.arm.frozen:
            for module in run.model.modules():
                if hasattr(module, "to_share"):
                    module.to_share.requires_grad_(False)
        return run

    @property
    def model(self) -> nn.Module:
        """The transformer."""
        return self.run.accelerator.unwrap_model(self.run.model)

    def train(self) -> dict[str, Any]:
        """Run all steps; returns milliseconds per step and the loss of the last tenth."""
        times, losses = [], []
        parts = self.run.batches(0, self.config.max_steps)
        for number, part in enumerate(parts):
            began = time.perf_counter()
            result = self.run.step(number, part)
            # Reading the loss waits for the device.
            losses.append(float(result.losses["loss"].mean()))
            times.append(time.perf_counter() - began)
        last = losses[-max(1, len(losses) // 10) :]
        return {
            "step_ms": round(1000 * statistics.median(times[len(times) // 3 :]), 2),
            "train_loss": round(statistics.mean(last), 5),
        }

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The loss of held-out images with their own caption, with another, and with none."""
        model, device = self.model.eval(), self.run.accelerator.device
        rows, found = self.data.held_out, {}
        options = {"seed": 1, "step": 0, "batch_size": len(rows)}
        randomness = step_randomness(self.run.task.objective, **options)
        batch = self.data.read(rows)
        other = self.data.text_of((self.data.labels[rows] + 7) % len(self.data.captions))
        none = {k: v[None].expand(len(rows), *v.shape) for k, v in self.data.empty_prompt.items()}
        for name, text in {"": {}, "_other_caption": other, "_no_caption": none}.items():
            losses = []
            for start in range(0, len(rows), self.config.batch_size):
                part = slice(start, start + self.config.batch_size)
                given = {k: v[part].to(device) for k, v in (batch | text).items()}
                with self.run.accelerator.autocast():
                    result = self.run.task.step_losses(
                        model, given, randomness.part(part).to(device)
                    )
                losses.append(result["loss"].float().cpu())
            found[f"held_out_loss{name}"] = round(float(torch.cat(losses).mean()), 5)
        return found

    @torch.no_grad()
    def draw(self, path: Path, steps: int) -> None:
        """One sample of each caption, with guidance, from the same noise in every arm."""
        model, device, task = self.model.eval(), self.run.accelerator.device, self.run.task
        count = len(self.data.captions)
        text = self.data.text_of(torch.arange(count))
        batch = {name: torch.cat((v, v)).to(device) for name, v in text.items()}
        dropped = torch.arange(2 * count, device=device) >= count
        scheduler = task.objective.scheduler()
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(2)
        noise = torch.randn(count, *self.data.sample_shapes[0], generator=generator)
        latents = noise.to(device)
        for step in scheduler.timesteps:
            times = step.to(device).expand(2 * count)
            with self.run.accelerator.autocast():
                both = task.conditioning.predict(
                    model, torch.cat((latents, latents)), times, batch, dropped
                ).float()
            own, none = both.chunk(2)
            velocity = none + GUIDANCE * (own - none)
            latents = scheduler.step(velocity, step, latents, return_dict=False)[0]
        pixels = latents.squeeze(2) if latents.ndim == 5 else latents
        array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        write_picture(path, Image.fromarray(tiled(list(array))))


def started(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The results so far, with these facts.

    Args:
        path: Of captioned.json, which may be missing.
        facts: What all of its arms have in common.

    Raises:
        SystemExit: If it has arms of other facts.
    """
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else facts
    if changes := differing_values({name: found.get(name) for name in facts}, facts):
        raise SystemExit(
            f"{path} has arms of other settings ({'; '.join(changes)}); choose another folder"
        )
    return {"arms": {}, **found, "date": date.today().isoformat()}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    head = "| arm | held-out loss | with another caption | with none | a step | parameters |\n"
    lines = [head + "|---|---|---|---|---|---|"]
    for name, row in found["arms"].items():
        losses = [row[f"held_out_loss{kind}"] for kind in ("", "_other_caption", "_no_caption")]
        cells = [f"{loss:.4f}" for loss in losses]
        cells += [f"{row['step_ms']:.1f} ms", f"{row['parameters'] / 1e6:.2f} M"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train all arms without a result."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=115.0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6, help="of 64 channels")
    parser.add_argument("--pixels", type=int, default=64, help="side of an image")
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--limit", type=int, default=0, help="take the first so many images")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    options, options.overrides = parser.parse_known_args()
    if any("=" not in word or word.startswith("-") for word in options.overrides):
        parser.error(f"expected key=value, found {' '.join(options.overrides)}")
    path = options.out / "captioned.json"
    facts = {"device": device_name(), "torch": torch.__version__, "settings": options.overrides}
    facts["images"] = file_digest(options.images)
    sizes = ("steps", "layers", "heads", "pixels", "limit", "sample_steps")
    found = started(path, facts | {name: getattr(options, name) for name in sizes})
    options.out.mkdir(parents=True, exist_ok=True)
    longest = 0.0
    for name in (name for name in options.arms if name not in found["arms"]):
        start = time.perf_counter()
        if start - began + longest > options.seconds:
            print(f"{name} and what follows is left for another call")
            break
        arm = ARMS[name]
        data = CaptionedEmoji(options.images, options.limit, options.pixels, arm.model == "wan")
        job = Job(arm, data, options)
        row: dict[str, Any] = job.train() | job.measure()
        row["parameters"] = sum(p.numel() for p in job.model.parameters())
        job.draw(options.out / f"{name}.png", options.sample_steps)
        longest = max(longest, time.perf_counter() - start)
        row["seconds"] = round(time.perf_counter() - start, 1)
        found["arms"][name] = row
        write_json(path, found, indent=1)
        print(name, row, flush=True)
    write_text(options.out / "captioned.md", table(found))


if __name__ == "__main__":
    main()
