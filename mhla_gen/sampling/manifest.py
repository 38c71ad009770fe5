"""How a sample set was made: what must be equal to resume it, and what a reader wants to know."""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhla_gen.config import SampleConfig
from mhla_gen.files.digests import file_digest, tensors_digest
from mhla_gen.files.saved import read_json
from mhla_gen.runtime.devices import device_name
from mhla_gen.sampling.samplers import Sampler
from mhla_gen.sampling.units import Units
from mhla_gen.version import installed

MANIFEST_NAME = "manifest.json"
_PACKAGES = ("mhla_gen", "torch", "diffusers", "transformers", "accelerate", "numpy")
_LISTED = 1000


def weights_of(pipeline: Any) -> dict[str, str]:
    """SHA-256 of the weights of every model of a pipeline, by its name there."""
    models = {k: v for k, v in pipeline.components.items() if isinstance(v, nn.Module)}
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda model: tensors_digest(model.state_dict()), models.values())
        return dict(zip(models, digests, strict=True))


def identity(
    sampler: Sampler, units: Units, weights: dict[str, str], device: torch.device, exact: bool
) -> dict[str, Any]:
    """Everything beside the settings that determines the samples.

    Args:
        sampler: Of the set.
        units: Of the set; what a call of the models is.
        weights: Digests by model.
        device: Where it is drawn; another kind rounds otherwise.
        exact: Whether samples have to be repeatable bit for bit.
    """
    records = [sampler.record(number) for number in range(len(sampler))]
    # An image is its content: the same file may be named in many ways.
    contents = {name: file_digest(name) for name in {r["image"] for r in records if "image" in r}}
    records = [r | {"image": contents[r["image"]]} if "image" in r else r for r in records]
    digest = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    found: dict[str, Any] = {"weights": weights, "samples": digest, "num_samples": len(sampler)}
    embeds = getattr(sampler, "embeds", None)
    if embeds is not None:
        found["prompt_embeds"] = tensors_digest(embeds)
    if exact:
        found |= {"model_batch_size": units.rows, "device": device.type}
    return found


def manifest(
    sampler: Sampler,
    config: SampleConfig,
    identity: dict[str, Any],
    files: Sequence[str],
    marks: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """How a sample set was made, for a reader who has only the folder.

    Args:
        sampler: What drew it.
        config: Its settings.
        identity: What else decided the samples.
        files: What the folder holds.
        marks: What the units' marks say.
    """
    pipeline = sampler.pipeline
    scheduler = pipeline.scheduler
    models = {
        name: {"class": type(model).__name__, **_public(model.config)}
        for name, model in pipeline.components.items()
        if isinstance(model, nn.Module) and (name.startswith("transformer") or name == "vae")
    }
    count = len(sampler)
    found = {
        "num_images": count,
        "shape": list(sampler.shape),
        "files": list(files),
        "seeds": f"sample i has seed {config.seed} + the 32 bits of i reversed, modulo 2^32",
        "settings": asdict(config),
        "pipeline": type(pipeline).__name__,
        **models,
        "scheduler": {"class": type(scheduler).__name__, **_public(scheduler.config)},
        "identity": identity,
        "versions": {name: found for name in _PACKAGES if (found := installed(name))},
        "python": platform.python_version(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "devices": sorted({mark["device"] for mark in marks}) or [device_name()],
    }
    if marks:
        found["sha256"] = digest_of(marks)
        found["notes"] = sorted({note for mark in marks for note in mark["notes"]})
    if any("prompt" in sampler.record(i) for i in range(min(count, 1))):
        found["seeds"] = "each sample's own, see samples"
        found["samples"] = [sampler.record(i) for i in range(min(count, _LISTED))]
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished set; empty before that."""
    path = folder / MANIFEST_NAME
    return read_json(path, "remove it to sample the set again") if path.is_file() else {}


def digest_of(marks: Sequence[dict[str, Any]]) -> str:
    """SHA-256 over the samples of all units."""
    digests = "".join(mark["sha256"] for mark in marks)
    return hashlib.sha256(digests.encode()).hexdigest()


def _public(config: Any) -> dict[str, Any]:
    """Public entries of a diffusers config, as JSON holds them."""
    entries = {key: value for key, value in config.items() if not key.startswith("_")}
    return json.loads(json.dumps(entries, default=str))
