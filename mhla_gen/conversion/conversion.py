"""`convert`: read, translate, write, and compare what was written with what was read."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

import mhla_gen
from mhla_gen.config import ConvertConfig, save_config
from mhla_gen.conversion import mhla_dit, mhla_wan, original_dit
from mhla_gen.conversion.keys import Converted, few
from mhla_gen.conversion.reading import read_checkpoint
from mhla_gen.errors import UserError
from mhla_gen.files import remove_leftovers, write_json, written_whole
from mhla_gen.files.saved import read_json, require_whole, sizes_below
from mhla_gen.hub import locate_part
from mhla_gen.models import MHLAWanTransformer3DModel
from mhla_gen.outputs.folders import CONFIG_NAME, made_with

EXPORT_NAME = "model.pt"
REPORT_NAME = "conversion.json"

# Format → the classes that can be written in it; their modules may need optional packages.
_WRITABLE = {
    "dit": ("OriginalDiTTransformer2DModel", "DiTTransformer2DModel"),
    "mhla_dit": ("MHLADiTTransformer2DModel",),
    "mhla_deit": ("MHLAVisionTransformer",),
    "mhla_wan": ("MHLAWanTransformer3DModel",),
}


def convert(config: ConvertConfig, dry_run: bool = False) -> None:
    """Import a checkpoint of other code into a folder of ours, or export the other way.

    The folder appears when all checks passed. They compare, bit for bit, the weights translated
    there and back, and the outputs of the model before writing and after loading.

    Args:
        config: Settings.
        dry_run: Do everything but write.

    Raises:
        ValueError: If the checkpoint is of another kind or cannot be represented exactly.
        OSError: If a file is missing or the output folder holds something else.
    """
    folder = Path(config.output_dir)
    if made_with(folder, config):
        remedy = f"remove {folder} to convert again"
        require_whole(folder, read_json(folder / REPORT_NAME, remedy).get("files", {}), remedy)
        print(f"{folder} already contains this conversion; nothing was done")
        return
    config.require_source()
    if not dry_run:
        remove_leftovers(folder.resolve().parent)
    if config.direction == "import":
        _import(config, folder, dry_run)
    else:
        _export(config, folder, dry_run)


def _import(config: ConvertConfig, folder: Path, dry_run: bool) -> None:
    converted = _read(read_checkpoint(Path(str(config.source)), config.weights), config)
    model = build(converted)
    _same_weights(_write(model.state_dict(), _settings(model), config), converted.source)
    summary = _summary(config, model, converted.differences)
    if dry_run:
        print(f"{summary}\nnothing was written (--dry-run)")
        return
    before = outputs(model)
    with written_whole(folder) as partial:
        # The widest dtype of the checkpoint holds all its weights exactly, so that diffusers'
        # warning about what should stay float32 does not apply.
        torch.nn.Module.to(model, _dtype(converted.source))
        model.save_pretrained(partial)
        del model
        loaded = converted.model_class.from_pretrained(partial, torch_dtype=torch.float32)
        _same_outputs(before, outputs(loaded.eval()))
        _finish(config, partial, converted)
    print(f"{summary}\n{folder}: reloaded, weights and outputs equal bit for bit")


def _export(config: ConvertConfig, folder: Path, dry_run: bool) -> None:
    source = _saved_folder(str(config.source))
    model_class, settings = _saved_model(source, config.format)
    state = read_checkpoint(source)
    written = _write(state, settings, config)
    model = model_class.from_pretrained(source, torch_dtype=torch.float32).eval()
    hints = replace(config, num_attention_heads=_num_heads(model))
    if config.format == "mhla_wan":
        hints = replace(hints, layout=settings["mhla"]["layout"])
    summary = _summary(config, model, ())
    if dry_run:
        print(f"{summary}\nnothing was written (--dry-run)")
        return
    before = outputs(model)
    del model
    with written_whole(folder) as partial:
        partial.mkdir()
        torch.save(written, partial / EXPORT_NAME)
        again = _read(read_checkpoint(partial / EXPORT_NAME), hints)
        _same_weights(again.state, state)
        _same_outputs(before, outputs(build(again)))
        _finish(config, partial, again)
    print(f"{summary}\n{folder / EXPORT_NAME}: read back, weights and outputs equal bit for bit")


def build(converted: Converted) -> Any:
    """A float32 model with the weights of a checkpoint, in evaluation mode.

    Raises:
        ValueError: If weights are missing or have other shapes than the model.
    """
    make = getattr(converted.model_class, "create", converted.model_class)
    model = make(**converted.arguments)
    expected = model.state_dict()
    missing = expected.keys() - converted.state.keys()
    extra = converted.state.keys() - expected.keys()
    if missing or extra:
        what = "lacks" if missing else "has too many weights:"
        raise UserError(f"the checkpoint {what} (by our names) {few(missing or extra)}")
    for key, tensor in converted.state.items():
        if tensor.shape != expected[key].shape:
            raise UserError(
                f"the checkpoint's {key} (our name) is {tuple(tensor.shape)}, but a "
                f"{type(model).__name__} of this size has {tuple(expected[key].shape)}"
            )
    model.load_state_dict(converted.state)
    return model.eval()


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """Outputs of a model for fixed noise: two timesteps, its own size for DiT, small for Wan."""
    generator = torch.Generator().manual_seed(0)
    if _is_classifier(model):
        size = (2, model.in_chans, *model.patch_embed.img_size)
        return model(torch.randn(size, generator=generator))
    config, timestep = model.config, torch.tensor([17, 901])
    if isinstance(model, MHLAWanTransformer3DModel):
        # One token a block is enough to run every weight.
        size = [n * p for n, p in zip(config.mhla["layout"], config.patch_size, strict=True)]
        text = torch.randn(2, 5, config.text_dim, generator=generator)
        latents = torch.randn(2, config.in_channels, *size, generator=generator)
        return model(latents, timestep, text).sample
    size = (config.in_channels, config.sample_size, config.sample_size)
    labels = torch.tensor([0, config.num_embeds_ada_norm])
    return model(torch.randn(2, *size, generator=generator), timestep, labels).sample


def _is_classifier(model: Any) -> bool:
    """Whether it is a model of timm: those have no config."""
    return not hasattr(model, "config")


def _settings(model: Any) -> Mapping[str, Any]:
    return {"mhla": model.mhla_config.to_dict()} if _is_classifier(model) else model.config


def _num_heads(model: Any) -> int:
    if _is_classifier(model):
        return model.blocks[0].attn.num_heads
    return model.config.num_attention_heads


def _read(state: Mapping[str, Tensor], config: ConvertConfig) -> Converted:
    if config.format == "mhla_wan":
        return mhla_wan.read(state, config.layout)
    if config.format == "dit":
        return original_dit.read(state, config.num_attention_heads)
    return _authors(config.format).read(
        state,
        config.num_attention_heads,
        normalizer=config.normalizer,
        allow_differences=config.allow_differences,
    )


def _write(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], config: ConvertConfig
) -> dict[str, Tensor]:
    if config.format == "mhla_wan":
        return mhla_wan.write(state, settings)
    if config.format == "dit":
        return original_dit.write(state, settings)
    # The way back of an import is asked for whatever the other code computes.
    normalizer = "paper" if config.direction == "import" else config.normalizer
    return _authors(config.format).write(state, settings, normalizer=normalizer)


def _authors(kind: str) -> Any:
    if kind == "mhla_dit":
        return mhla_dit
    # It needs timm.
    return importlib.import_module("mhla_gen.conversion.mhla_deit")


def _saved_folder(source: str) -> Path:
    """The folder of the transformer of a model, pipeline or run."""
    place, location = locate_part(source, "transformer")
    return Path(place, *location.values())


def _saved_model(folder: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    """Class and settings of a folder that `save_pretrained` wrote."""
    saved = read_json(folder / "config.json", "save or copy the model again")
    name = saved.get("_class_name")
    if name not in _WRITABLE[kind]:
        raise UserError(
            f"format {kind} is for {' or '.join(_WRITABLE[kind])}, but {folder} holds a {name}"
        )
    model_class = getattr(mhla_gen, name, DiTTransformer2DModel)
    parameters = inspect.signature(model_class.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    # diffusers' DiT has no such setting and always computes with 1.
    return model_class, {"timestep_freq_shift": 1.0, **defaults, **saved}


def _same_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if found.keys() != expected.keys():
        raise UserError(f"weights were lost or added: {few(found.keys() ^ expected.keys())}")
    for key, tensor in expected.items():
        # The table of positions is computed, not learned; reading checked it.
        if key != "pos_embed" and not torch.equal(found[key].to(tensor.dtype), tensor):
            raise UserError(f"{key} changed on the way there and back; nothing was written")


def _same_outputs(before: Tensor, after: Tensor) -> None:
    if not torch.equal(before, after):
        error = (before - after).abs().max().item()
        raise UserError(f"the written model's outputs differ by {error:.1e}; nothing was written")


def _dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = [tensor.dtype for tensor in state.values()]
    widest = dtypes[0]
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def _summary(config: ConvertConfig, model: Any, differences: tuple[str, ...]) -> str:
    lines = [
        f"{config.source} ({config.format}, {config.direction}): {type(model).__name__}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters"
    ]
    return "\n".join(lines + [f"NOT the same function: {text}" for text in differences])


def _finish(config: ConvertConfig, partial: Path, converted: Converted) -> None:
    report = {
        "source": str(config.source),
        "format": config.format,
        "direction": config.direction,
        "exact": not converted.differences,
        "differences": list(converted.differences),
        "files": sizes_below(partial),
    }
    write_json(partial / REPORT_NAME, report)
    save_config(config, partial / CONFIG_NAME)
