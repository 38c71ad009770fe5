"""Checks of packages, weights and folders."""

import importlib.metadata
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from packaging.requirements import Requirement

from mhla_gen.config import FeaturesConfig
from mhla_gen.evaluation.feature_cache import cached_sets
from mhla_gen.version import __version__, installed

State = Literal["ok", "absent", "broken"]
"""absent is fine: something optional is not there."""


class Result(NamedTuple):
    """State, what was seen, and what to do."""

    state: State
    detail: str
    remedy: str = ""


# Of the required packages, those that others ask for when something differs.
_NAMED = ("torch", "diffusers", "accelerate", "transformers", "decord2", "tensorboard")
# Packages that only some settings need: the setting, and what pip installs.
_OPTIONAL = {
    "datasets": ("data.source=huggingface", "mhla_gen[datasets]"),
    "efficientnet-lite-pytorch": (
        "features.extractor=efficientnet-lite0",
        "mhla_gen[efficientnet]",
    ),
    "ftfy": ("cleans prompts for Wan", "ftfy"),
    "timm": ("vision classifiers", "mhla_gen[vision]"),
    "peft": ("model.trainable=lora", "peft"),
    "wandb": ("report_to=wandb", "wandb"),
}


def check_versions() -> Result:
    """Are the required packages installed, in the required versions?"""
    system = f"mhla_gen {__version__}, Python {platform.python_version()}, {platform.platform()}"
    wrong = []
    for text in importlib.metadata.requires("mhla_gen") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = installed(requirement.name)
        if found is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, needs {requirement.specifier}")
    if wrong:
        return Result(
            "broken",
            f"{system}: {'; '.join(wrong)}",
            f"{sys.executable} -m pip install mhla_gen",
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _NAMED)
    return Result("ok", f"{system}; {versions}")


def check_optional() -> Result:
    """Which optional packages are installed?"""
    found = {name: installed(name) for name in _OPTIONAL}
    here = ", ".join(f"{name} {version}" for name, version in found.items() if version) or "none"
    missing = [name for name, version in found.items() if version is None]
    if not missing:
        return Result("ok", here)
    without = ", ".join(f"{name} ({_OPTIONAL[name][0]})" for name in missing)
    wanted = [_OPTIONAL[name][1] for name in missing]
    remedy = shlex.join([sys.executable, "-m", "pip", "install", *wanted])
    return Result("absent", f"{here}; without {without}", remedy)


def check_inception() -> Result:
    """Are the weights of FID's network on this machine?"""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]
    if path.is_file():
        return Result("ok", f"Inception weights in {path}")
    return Result(
        "absent",
        "Inception weights are not downloaded yet",
        f"`mhla-gen evaluate` downloads them once; offline, put the file at {path} or set "
        "features.weights",
    )


def check_caches() -> Result:
    """Can the folders for weights and features be written to?"""
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
        where = " and ".join(text.split(";")[0] for text in closed)
        return Result("broken", f"cannot write {where}", closed[0])
    sets = cached_sets(folders["features"][0])
    size = f"{sum(each.size for each in sets) / 1e9:.2f} GB of features in {len(sets)} sets"
    where = ", ".join(str(folder) for folder, _ in folders.values())
    return Result("ok", f"writable: {where}; {size}, at most {FeaturesConfig().cache_limit_gb:g}")
