"""One real clip memorised by a small Wan, with MHLA and with softmax attention.

    python experiments/video_overfit.py CLIP OUT_FOLDER --seconds 45

CLIP is a video, or a .npy file of its frames, uint8 `[frames, height, width, 3]`.

No pretrained autoencoder is needed: "latents" are blocks of 4 × 4 pixels, folded into 48 channels.
Each model learns the clip by flow matching for the same wall time, then samples it from noise; PSNR
compares the sample with the clip. Writes overfit.json, overfit.png (the original and the samples,
one row each) and the samples as overfit.npz.
"""

import argparse
import json
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

import mhla_gen
from mhla_gen.config import MHLAConfig
from mhla_gen.data.buckets import Bucket, crop_for, resampled_frames
from mhla_gen.files import write_json
from mhla_gen.runtime.devices import device_name
from mhla_gen.sampling.sample_files import write_sheet
from mhla_gen.training.objectives import FlowMatching
from mhla_gen.training.optim import build_optimizer
from mhla_gen.training.randomness import step_randomness
from mhla_gen.training.step import ObjectiveLosses
from mhla_gen.training.wan_conditions import WanConditions

FOLD = 4
TEXT = torch.zeros(1, 64)
MODELS = {
    "mhla": MHLAConfig(layers="all"),
    "linear": MHLAConfig(layers="all", layout=(1, 1, 1)),
    "softmax": None,
}


def read_clip(path: Path, frames: int, height: int, width: int) -> np.ndarray:
    """The first frames, cropped and resized, uint8 `[frames, height, width, 3]`.

    Raises:
        ValueError: If frames in a .npy file have another size.
    """
    if path.suffix == ".npy":
        clip = np.load(path)[:frames]
        if clip.shape != (frames, height, width, 3):
            raise ValueError(f"{path} has {clip.shape}, not {(frames, height, width, 3)}")
        return clip
    from mhla_gen.media import Decoder

    with Decoder(60, 1) as decoder:
        facts = decoder.facts(path)
        shown = resampled_frames(facts.times, 16.0)[:frames]
        crop = crop_for(Bucket(frames, height, width), facts.height, facts.width)
        return decoder.frames(path, [int(i) for i in shown], crop)


def to_latents(clip: np.ndarray) -> torch.Tensor:
    """Pixels in [-1, 1], folded: `[1, 48, frames, height / 4, width / 4]`."""
    pixels = torch.from_numpy(clip).float().permute(0, 3, 1, 2) / 127.5 - 1
    return F.pixel_unshuffle(pixels, FOLD).transpose(0, 1)[None]


def to_pixels(latents: torch.Tensor) -> np.ndarray:
    """Inverse of `to_latents`."""
    pixels = F.pixel_shuffle(latents[0].transpose(0, 1), FOLD).permute(0, 2, 3, 1)
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def build(attention: MHLAConfig | None, layers: int, heads: int) -> WanTransformer3DModel:
    """A small Wan with random weights."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=3 * FOLD**2,
        out_channels=3 * FOLD**2,
        text_dim=TEXT.shape[1],
        ffn_dim=4 * 64 * heads,
        num_layers=layers,
    )
    return model if attention is None else mhla_gen.inject(model, attention)


def memorise(model, latents, options, device) -> dict:
    """Train for a wall time; returns steps, seconds per step and the last losses."""
    objective = FlowMatching()
    learn = ObjectiveLosses(objective, WanConditions(TEXT, (1, 2, 2)))
    optimizer = build_optimizer(model.train(), options.learning_rate, 0.0)
    batch = {
        "samples": latents.expand(options.batch_size, -1, -1, -1, -1),
        "prompt_embeds": TEXT.expand(options.batch_size, -1, -1).to(device),
    }
    losses, began, step = [], time.perf_counter(), 0
    while (progress := (time.perf_counter() - began) / options.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1, step / 50) * (1 - progress) ** 0.5
        randomness = step_randomness(
            objective, seed=0, step=step, batch_size=options.batch_size
        ).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = learn(model, batch, randomness)["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
    spent = time.perf_counter() - began
    last = losses[-max(1, len(losses) // 20) :]
    return {"steps": step, "ms_per_step": 1e3 * spent / step, "last_loss": float(np.mean(last))}


@torch.no_grad()
def drawn(model, shape, steps, device) -> torch.Tensor:
    """Sample the clip from noise by Euler steps."""
    scheduler = FlowMatching().scheduler()
    scheduler.set_timesteps(steps, device=device)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    conditioning, latents = WanConditions(TEXT, (1, 2, 2)), noise
    batch, dropped = {"prompt_embeds": TEXT[None].to(device)}, torch.tensor([False], device=device)
    for timestep in scheduler.timesteps:
        with torch.autocast(device.type, torch.bfloat16):
            velocity = conditioning.predict(model, latents, timestep[None], batch, dropped)
        latents = scheduler.step(velocity.float(), timestep, latents).prev_sample
    return latents


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """PSNR of all pixels of a clip, in decibels."""
    error = np.mean((found.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(255**2 / error))


def main() -> None:
    """Memorise the clip with every kind of attention, sample it, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--size", type=int, nargs=3, default=(17, 144, 176))
    parser.add_argument("--models", nargs="+", default=["mhla", "softmax"], choices=list(MODELS))
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    clip = read_clip(options.clip, *options.size)
    latents = to_latents(clip).to(device)
    rows, pictures = [], [("original", clip)]
    for name in options.models:
        model = build(MODELS[name], options.layers, options.heads).to(device)
        warm = SimpleNamespace(**vars(options) | {"seconds": 0.01})
        memorise(
            build(MODELS[name], options.layers, options.heads).to(device), latents, warm, device
        )
        row = {"model": name, **memorise(model, latents, options, device)}
        found = to_pixels(drawn(model.eval(), latents.shape, 50, device))
        row["psnr_db"] = psnr(found, clip)
        rows.append(row)
        print(json.dumps(row), flush=True)
        pictures.append((f"{name}, {row['psnr_db']:.1f} dB", found))
    shown = np.linspace(0, len(clip) - 1, 6).round().astype(int)
    np.savez_compressed(
        options.out / "overfit.npz",
        **{row["model"]: drawn for row, (_, drawn) in zip(rows, pictures[1:], strict=True)},
    )
    rows_shown = [(title, frames[shown]) for title, frames in pictures]
    write_sheet(options.out / "overfit.png", rows_shown, is_video=True)
    _, _, frames, height, width = latents.shape
    facts = {
        "clip": options.clip.name,
        "frames × height × width": list(clip.shape[:3]),
        "tokens": frames * height * width // 4,
        "seconds": options.seconds,
        "batch_size": options.batch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": device_name(device),
        "torch": torch.__version__,
        "date": str(date.today()),
    }
    write_json(options.out / "overfit.json", facts | {"rows": rows}, indent=1)


if __name__ == "__main__":
    main()
