"""Settings of convert, bench and doctor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mhla_gen.config.checks import (
    check_checkpointing,
    check_choice,
    elements,
    normalize_integers,
    normalize_layout,
)
from mhla_gen.config.fields import Count, Depth, FilePath, Settings
from mhla_gen.errors import MissingError, UserError


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Settings):
    """Import checkpoints of other code, or export to them.

    Raises:
        ValueError: If a value is out of its range.
    """

    source: FilePath | None = None
    """Import: a .safetensors file, a folder of them, or a file of torch.save. Export: a folder
    written by `save_pretrained`, of a transformer or a pipeline, or a finished run."""
    output_dir: FilePath = "runs/convert"
    """New folder, for a transformer (import) or for model.pt, a state dict (export)."""
    format: Literal["dit", "mhla_dit", "mhla_deit", "mhla_wan"] = "dit"
    """Format of the other code: facebookresearch/DiT, or the MHLA authors' DiT, DeiT or Wan."""
    direction: Literal["import", "export"] = "import"
    """import reads that format, export writes it."""
    weights: Literal["auto", "ema", "state_dict_ema", "model", "state_dict"] = "auto"
    """Entry of a training checkpoint; auto takes the first that exists, in this order."""
    num_attention_heads: Count | None = None
    """Heads of a DiT or DeiT of an unpublished width, which the weights do not determine."""
    layout: Any = None
    """mhla_wan: blocks along frames, height and width, such as (3, 5, 10); the weights only
    determine their product."""
    normalizer: Literal["released", "paper"] = "released"
    """mhla_dit and mhla_deit: the denominator of the other code; the released one differs from the
    paper's Eq. 4."""
    allow_differences: bool = False
    """mhla_dit and mhla_deit: convert although the model will compute something else, to start
    training from it."""

    def __post_init__(self):
        super().__post_init__()
        if self.layout is not None:
            self._settle(layout=normalize_integers("layout", self.layout, 1))
        deits = ("mhla_dit", "mhla_deit")
        only = {"layout": ("mhla_wan",), "normalizer": deits, "allow_differences": deits}
        for name, used in only.items():
            given = getattr(self, name) not in (None, False, "released")
            if given and self.format not in used:
                raise UserError(
                    f"{name} is for format={' or '.join(used)}, found format={self.format}"
                )

    def require_source(self) -> None:
        """Raise unless there is something to convert.

        Raises:
            UserError: Naming the setting.
        """
        if self.source is None:
            raise UserError("set source to the checkpoint to convert")
        if self.direction == "export" and not Path(self.source).is_dir():
            raise MissingError(
                f"source {self.source} is not a folder: an export takes that of a model, a "
                "pipeline or a run; download from the hub first (hf download)"
            )
        if not Path(self.source).exists():
            raise MissingError(f"source {self.source} does not exist")


# Methods of BenchConfig that models are not measured with, and settings for operators.
_OPS_ALONE = ("softmax_causal", "linformer", "causal")
_HALVES = ("exact", "linear=")
_FEATURES = ("feature_map=", "learned_features=", "magnitude=")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Settings):
    """Latency and memory of attention operators or of whole models, side by side.

    Raises:
        ValueError: If a value is out of its range.
    """

    subject: Literal["ops", "model"] = "ops"
    """Measure the operators alone, or one denoising step of a transformer."""
    output_dir: FilePath = "runs/bench"
    """Folder for bench.json and bench.png."""
    methods: Any = "auto"
    """Rows for every size: softmax (torch's choice), softmax_cudnn, softmax_flash, linear, and MHLA
    as naive, blockwise, fused or auto. Settings may follow. For ops: those of halves and features,
    as in "fused exact=0.05 linear=false" or "linear feature_map=elu+1 magnitude=true". For models:
    any of MHLA, as in "fused conv=false gate=false" or "fused layers=2/3". For ops alone:
    "linformer projected_len=256", "causal block_size=64 window=256" and softmax_causal. "auto"
    takes softmax_cudnn, softmax_flash, linear, fused and shares of 5 and 12.5 % on a GPU, softmax,
    linear, blockwise and 12.5 % elsewhere."""
    grids: Any = "squares"
    """Token grids, one size each: a list such as [[16, 16], [32, 32]], "squares" (8×8 to 64×64),
    or "models", those of DiT, Flux and Wan models with their heads."""
    layout: Any = "auto"
    """Blocks along each axis of the grids, or "auto"."""
    batch_size: Count = 1
    """Sequences at once."""
    num_heads: Count = 4
    """Heads of the operators."""
    head_dim: Count = 64
    """Channels per head of the operators."""
    rotary: bool = False
    """Rotate queries and keys inside the linear operators."""
    backward: bool = True
    """Also time forward and backward together."""
    checkpointing: Any = True
    """Use gradient checkpointing in the backward pass of a model: true, false, selective, or the
    share of its blocks; see training."""
    model: Literal["dit", "flux", "wan"] = "dit"
    """DiT-XL/2, FLUX.1-dev or Wan2.1-1.3B, random weights."""
    num_layers: Depth | None = None
    """Layers of the model (for Flux, those with two streams); None takes all."""
    compile: Any = False
    """torch.compile: false, true (each repeated block) or "whole" (the model in one graph)."""
    cuda_graphs: bool = False
    """Record each step of a model as a CUDA graph and time its replay, without the time that the
    host takes to launch kernels. Needs a GPU."""
    profile: bool = False
    """Also list the kernels that a step of a model spends its time in."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Dtype of inputs and models; auto is bfloat16 on a GPU and float32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def __post_init__(self):
        super().__post_init__()
        known = (
            *("softmax", "softmax_cudnn", "softmax_flash", "linear", *_OPS_ALONE),
            *("naive", "blockwise", "fused", "auto"),
        )
        if self.methods != "auto":
            listed = elements(self.methods)
            if not listed:
                raise UserError(
                    f'methods must be "auto" or a list of {", ".join(known)}; '
                    f"found {self.methods!r}"
                )
            for method in listed:
                name, *settings = str(method).split()
                check_choice("methods", name, known)
                if name in _OPS_ALONE and self.subject != "ops":
                    raise UserError(f"{name} in methods is for subject=ops")
                if name in ("linformer", "causal"):
                    continue
                known_settings = _FEATURES if name == "linear" else (*_HALVES, *_FEATURES)
                of_ops = all(setting.startswith(known_settings) for setting in settings)
                if settings and name.startswith("softmax"):
                    raise UserError(f"settings in methods are for MHLA, found {method!r}")
                if self.subject == "ops" and not of_ops:
                    raise UserError(
                        "settings in methods of subject=ops are those of the halves (exact…, "
                        "linear, not of linear attention) and of features (feature_map, "
                        f"learned_features, magnitude), found {method!r}"
                    )
            self._settle(methods=listed)
        check_checkpointing("checkpointing", self.checkpointing)
        for name in ("cuda_graphs", "profile"):
            if getattr(self, name) and self.subject == "ops":
                raise UserError(f"{name} is for subject=model, found subject=ops")
        self._settle(layout=normalize_layout("layout", self.layout))
        if self.grids == "squares":
            self._settle(grids=tuple((side, side) for side in (8, 16, 32, 64)))
        if self.grids != "models":
            listed = elements(self.grids)
            if not listed:
                raise UserError(
                    'grids must be "squares", "models" or a list such as [[16, 16]], '
                    f"found {self.grids!r}"
                )
            grids = tuple(normalize_integers("grids", grid, 1) for grid in listed)
            self._settle(grids=grids)
        check_choice("compile", self.compile, (False, True, "whole"))


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Settings):
    """Which parts of the installation to try."""

    checks: tuple[str, ...] = ()
    """Names of checks to run; empty means all. `mhla-gen doctor --dry-run` lists them."""
