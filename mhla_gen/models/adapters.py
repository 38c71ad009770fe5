"""Adapters: what was added to a pretrained model, in one file of a few megabytes.

An adapter holds the weights and settings of MHLA, of its exact half and of LoRA. Of the base model
it records the class, the name and a digest of every weight.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mhla_gen.config import attention_from_dict
from mhla_gen.errors import MissingError, UserError
from mhla_gen.files import written_whole
from mhla_gen.hub import ADAPTER_NAME, adapter_file
from mhla_gen.models.base_weights import BaseWeights
from mhla_gen.models.families import MHLA_CLASSES
from mhla_gen.models.injection import (
    components_of,
    inject,
    is_language_model,
    is_vision_model,
    take_out,
    update_index,
)
from mhla_gen.models.lora import add_lora_weights, check_lora, lora_of, remove_lora
from mhla_gen.models.short import unmentioned
from mhla_gen.models.surgery import new_modules
from mhla_gen.models.transformer import MHLATransformerMixin

_FORMAT = "mhla_gen adapter 1"
_ALONE = "transformer"
"""Name in the file of a transformer that is not part of a pipeline."""
_LOADED = "_mhla_adapter"
"""Attribute of a transformer with a loaded adapter: where the adapter came from."""


def save_adapter(pipe_or_transformer: Any, folder: str | Path) -> Path:
    """Write what MHLA and LoRA added to a model, without the model.

    Args:
        pipe_or_transformer: A transformer with MHLA layers, or a pipeline that holds one or more.
        folder: Where to write `mhla_adapter.safetensors`; an existing file is replaced.

    Returns:
        Path of the file.

    Raises:
        ValueError: If nothing was added, or there is more than one LoRA.
        OSError: If the file cannot be written.
    """
    tensors, described = {}, {}
    for name, model in _transformers(pipe_or_transformer).items():
        if not issubclass(type(model), MHLATransformerMixin):
            continue
        lora, lora_tensors = lora_of(model)
        added = {k: v for k, v in model.state_dict().items() if ".mhla." in k} | lora_tensors
        tensors |= {f"{name}.{k}": v.detach().cpu().contiguous() for k, v in added.items()}
        described[name] = {
            "base_class": model.family.softmax_class(model).__name__,
            "base": str(model.config.get("_name_or_path") or ""),
            "mhla": model.mhla_config.to_dict(),
            "settings": model.family.settings(model),
            "lora": lora,
            "weights": BaseWeights.of(model).digests,
        }
    if not described:
        raise UserError("the model has no MHLA layers, so there is no adapter to save")
    path = Path(folder).expanduser() / ADAPTER_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        metadata = {"format": _FORMAT, "transformers": json.dumps(described)}
        save_file(tensors, partial, metadata=metadata)
    return path


def load_adapter(pipe_or_transformer: Any, folder_or_name: str | Path, **location: Any) -> Any:
    """Load an adapter into a softmax model, in place; an adapter loaded before is removed.

    Args:
        pipe_or_transformer: A transformer of the adapter's class, or a pipeline that holds it.
        folder_or_name: Folder or file that `save_adapter` wrote; the newest state of a
            training run of this toolkit that trained nothing else; or a name on the hub.
        location: For a name on the hub: `revision`, `token`, `cache_dir`, `subfolder`.

    Returns:
        `pipe_or_transformer`.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If the adapter is for another architecture, or the model has MHLA layers that
            did not come from an adapter.
    """
    path = _find(folder_or_name, location)
    described, tensors = _read(path)
    parts = _transformers(pipe_or_transformer)
    if parts.keys() == {_ALONE} and len(described) == 1:
        parts = {name: parts[_ALONE] for name in described}
    if described.keys() - parts.keys():
        raise UserError(
            f"{path} is an adapter for {_and(described)}, but the model has {_and(parts)}"
        )
    for name in described:
        _check(path, parts[name], described[name], tensors[name])
    if any(hasattr(model, _LOADED) for model in parts.values()):
        unload_adapter(pipe_or_transformer)
    for name in described:
        model = parts[name]
        with unmentioned():
            inject(model, attention_from_dict(described[name]["mhla"]))
        setattr(model, _LOADED, str(path))
        state = {k: v for k, v in tensors[name].items() if ".mhla." in k}
        model.load_state_dict(state, strict=False)
        add_lora_weights(model, described[name]["lora"], tensors[name])
    return update_index(pipe_or_transformer)


def unload_adapter(pipe_or_transformer: Any) -> Any:
    """Remove what `load_adapter` added, which restores the softmax model bit for bit.

    Args:
        pipe_or_transformer: What `load_adapter` was given.

    Returns:
        `pipe_or_transformer`.

    Raises:
        ValueError: If no adapter is loaded.
    """
    parts = _transformers(pipe_or_transformer)
    loaded = [model for model in parts.values() if hasattr(model, _LOADED)]
    if not loaded:
        raise UserError("the model has no adapter to unload; mhla_gen.restore undoes inject")
    for model in loaded:
        remove_lora(model)
        if isinstance(model, MHLATransformerMixin):
            take_out([model])
        delattr(model, _LOADED)
    return update_index(pipe_or_transformer)


def _transformers(pipe_or_transformer: Any) -> dict[str, Any]:
    """The transformers that can have MHLA layers, by their names in the pipeline.

    Raises:
        ValueError: If the model comes from another library than diffusers.
    """
    if is_language_model(pipe_or_transformer) or is_vision_model(pipe_or_transformer):
        raise UserError(
            "adapters are for models of diffusers, found a "
            f"{type(pipe_or_transformer).__name__}; use its save_pretrained and from_pretrained"
        )
    if not isinstance(pipe_or_transformer, DiffusionPipeline):
        return {_ALONE: pipe_or_transformer}
    return components_of(pipe_or_transformer)


def _find(folder_or_name: str | Path, location: dict[str, Any]) -> Path:
    found = adapter_file(folder_or_name, str(location.get("subfolder") or ""))
    if found is not None:
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(folder_or_name), ADAPTER_NAME, **location))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MissingError(
            f"{folder_or_name} is not a folder here, and the hub has no {ADAPTER_NAME} of this "
            f"name, or cannot be reached: {str(error).splitlines()[0]}"
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """An adapter's descriptions and tensors, by transformer."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise UserError(
            f"{path} is no adapter that this version reads: expected {_FORMAT!r}, found "
            f"{metadata.get('format')!r}"
        )
    described = json.loads(metadata["transformers"])
    return described, {
        name: {
            k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")
        }
        for name in described
    }


def _check(path: Path, model: Any, described: Any, tensors: Mapping[str, Tensor]) -> None:
    """Check an adapter against a model before anything changes."""
    found = type(model)
    if issubclass(found, MHLATransformerMixin):
        if not hasattr(model, _LOADED):
            raise UserError(
                "the model has MHLA layers of its own; call mhla_gen.restore on it first"
            )
        found = model.family.softmax_class(model)
    if found.__name__ != described["base_class"]:
        raise UserError(
            f"{path} is an adapter for a {described['base_class']}, found a {found.__name__}"
        )
    if _is_group_offload_enabled(model):
        raise UserError("the model is offloaded by groups; load the adapter before that")
    family = MHLA_CLASSES[found].family
    if family.settings(model) != described["settings"]:
        raise UserError(
            f"{path} is for a model with {described['settings']}, found {family.settings(model)}"
        )
    expected = dict(_expected(family, model, described["mhla"]))
    found_shapes = {k: v.shape for k, v in tensors.items() if ".mhla." in k}
    for name in sorted(expected.keys() | found_shapes.keys()):
        if expected.get(name) != found_shapes.get(name):
            raise UserError(
                f"{path} is for a {found.__name__} of other sizes: {name} is "
                f"{_shape(found_shapes.get(name))}, expected {_shape(expected.get(name))}"
            )
    check_lora(path, model, described["lora"], tensors)
    different = BaseWeights.of(model).different(described["weights"])
    if different:
        warnings.warn(
            f"{path} was made for other weights than these: {len(different)} of "
            f"{len(described['weights'])} differ, such as {different[0]}, from "
            f"{described['base'] or 'a model without a name'}",
            stacklevel=3,
        )


def _expected(family: Any, model: Any, settings: Any) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of the weights that MHLA adds to a model."""
    try:
        with torch.device("meta"):
            added = new_modules(family, model, attention_from_dict(settings))
    except ValueError as error:
        raise UserError(f"the adapter is for a model of other sizes: {error}") from error
    for path, child in added.items():
        for name, value in child.state_dict().items():
            yield f"{path}.mhla.{name}", value.shape


def _shape(size: torch.Size | None) -> str:
    return "nothing" if size is None else str(list(size))


def _and(names: Any) -> str:
    return " and ".join(names) or "no transformer that takes MHLA"
