"""Reading weights from foreign files: tensors only, without running their code."""

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mhla_gen.errors import MissingError, UserError, one_line
from mhla_gen.files.saved import NO_STATE

# What training scripts put around a model's weights, in the order of preference of `auto`.
_ENTRIES = ("ema", "state_dict_ema", "model", "state_dict")
# What wrappers put before every name.
_PREFIXES = ("module.", "_orig_mod.")


def read_checkpoint(path: str | Path, entry: str = "auto") -> dict[str, Tensor]:
    """Read a state dict without unpickling anything but tensors.

    Args:
        path: A `.safetensors` file, a folder of them, or a file of `torch.save`.
        entry: Which weights of a training checkpoint: `ema`, `state_dict_ema`, `model` or
            `state_dict`; `auto` takes the first of these that is there. Ignored where the file is a
            state dict itself.

    Returns:
        Names without the prefixes of DDP and `torch.compile`, and their tensors, on the CPU.

    Raises:
        ValueError: If the file is broken, holds more than tensors, or has no such entry.
        OSError: If there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        contents = _read_folder(path)
    elif path.suffix == ".safetensors":
        contents = _read_safetensors(path)
    else:
        contents = _read_torch(path)
    state = _choose(contents, entry, path)
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _read_folder(path: Path) -> dict[str, Tensor]:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pipeline = (path / "model_index.json").exists()
        hint = "; mhla_gen.inject and `mhla-gen train` take pipelines of diffusers as they are"
        raise MissingError(f"{path} has no .safetensors files{hint * pipeline}")
    contents: dict[str, Tensor] = {}
    for file in files:
        shard = _read_safetensors(file)
        twice = sorted(shard.keys() & contents.keys())
        if twice:
            raise UserError(f"{path} has {twice[0]} in two files; give one of the files")
        contents |= shard
    return contents


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingError(f"checkpoint {path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    if not path.is_file():
        raise MissingError(f"checkpoint {path} does not exist")
    # DiT's training script saves its command line as a Namespace, a plain bag of values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            # Training checkpoints hold the weights several times; mapped, what is unused costs
            # nothing.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path} contains more than tensors or is not a file of torch.save; it is not "
                "unpickled, because that would run its code: ask for a safetensors file"
            ) from error
        except NO_STATE as error:
            reason = one_line(f"{type(error).__name__}: {error}", 200)
            raise UserError(f"{path} is not a complete file of torch.save ({reason})") from error


def _choose(contents: Any, entry: str, path: Path) -> dict[str, Tensor]:
    if _is_state(contents):
        return dict(contents)
    found = contents if isinstance(contents, Mapping) else {}
    entries = [name for name in _ENTRIES if _is_state(found.get(name))]
    if not entries:
        raise UserError(f"{path} contains no state dict, directly or as {', '.join(_ENTRIES)}")
    if entry == "auto":
        return dict(found[entries[0]])
    if entry not in entries:
        raise UserError(f"{path} has no weights {entry!r}; it has {', '.join(entries)}")
    return dict(found[entry])


def _is_state(contents: Any) -> bool:
    return (
        isinstance(contents, Mapping)
        and len(contents) > 0
        and all(isinstance(key, str) for key in contents)
        and all(isinstance(value, Tensor) for value in contents.values())
    )
