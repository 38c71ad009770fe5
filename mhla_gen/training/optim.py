"""The optimizer, and the rules for mixing matrices, which hold for any optimizer."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mhla_gen.errors import UserError
from mhla_gen.models.additions import AddedAttention
from mhla_gen.training.shards import held

# They want sparse gradients, or the loss again and again within a step.
_UNUSABLE = ("Optimizer", "SparseAdam", "LBFGS")
# One kernel for all weights, on every device.
_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def mixing_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable mixing matrices of all MHLA layers."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[-1] == "mixing" and parameter.requires_grad
    ]


def mhla_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All that MHLA layers added to a model, including mixing."""
    return [p for m in model.modules() if isinstance(m, AddedAttention) for p in m.parameters()]


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    mixing_learning_rate: float | None = None,
    mhla_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with and without weight decay.

    What has a learning rate of its own, mixing matrices or all that MHLA added, follows in further
    groups. Mixing matrices without one have that of the rest of MHLA.

    Weight matrices and convolutions decay. Biases, norms, embedding tables and mixing matrices do
    not: decay would pull a mixing matrix, whose entries are weights of an average, to zero.
    """
    mixing = {id(parameter) for parameter in mixing_matrices(model)}
    added = {id(parameter) for parameter in mhla_parameters(model)}
    exempt = set(mixing)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            exempt.add(id(module.weight))

    def kind(parameter: nn.Parameter) -> tuple[float | None, bool]:
        own = mhla_learning_rate if id(parameter) in added else None
        if id(parameter) in mixing and mixing_learning_rate is not None:
            own = mixing_learning_rate
        return own, parameter.ndim >= 2 and id(parameter) not in exempt

    members: dict[tuple[float | None, bool], list[nn.Parameter]] = {(None, True): []}
    members[None, False] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            members.setdefault(kind(parameter), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            **({} if own_rate is None else {"lr": own_rate}),
        }
        for (own_rate, decays), parameters in members.items()
    ]


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    mixing_learning_rate: float | None = None,
    mhla_learning_rate: float | None = None,
    name: str = "AdamW",
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer that keeps the model's mixing matrices in [0, 1] after every step.

    Args:
        model: Its trainable parameters, grouped by `parameter_groups`.
        learning_rate: Peak.
        weight_decay: Of weight matrices and convolutions.
        mixing_learning_rate: As in `parameter_groups`.
        mhla_learning_rate: As in `parameter_groups`.
        name: As in `optimizer_class`.
        options: Further arguments of the class.

    Raises:
        UserError: If there is no such optimizer, or it does not take these settings.
    """
    groups = parameter_groups(model, weight_decay, mixing_learning_rate, mhla_learning_rate)
    kind = optimizer_class(name)
    known = inspect.signature(kind).parameters
    if weight_decay and "weight_decay" not in known:
        raise UserError(f"optimizer {name} has no weight decay; set weight_decay=0")
    options = {"fused": True, **(options or {})} if kind in _FUSED else options or {}
    try:
        optimizer = kind(groups, lr=learning_rate, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer {name} cannot be made: {error}") from error
    keep_mixing_in_range(optimizer, model)
    return optimizer


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """An optimizer by name: a class of torch.optim, or bitsandbytes.CLASS.

    Raises:
        UserError: If there is none, or bitsandbytes is not installed.
    """
    library, _, own_name = name.rpartition(".")
    module: ModuleType = torch.optim
    if library == "bitsandbytes":
        try:
            module = importlib.import_module("bitsandbytes.optim")
        except ImportError as error:
            raise UserError(
                f'optimizer {name} needs one more package: pip install "mhla_gen[bitsandbytes]"'
            ) from error
    known = library in ("", "bitsandbytes") and own_name not in _UNUSABLE
    found = getattr(module, own_name, None) if known else None
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        return found
    raise UserError(
        "optimizer must be a class of torch.optim for dense gradients, such as Adafactor, or of "
        f"bitsandbytes, such as bitsandbytes.AdamW8bit, found {name!r}"
    )


def keep_mixing_in_range(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Clip a model's mixing matrices to [0, 1] after each step of an optimizer.

    Args:
        optimizer: Of the model.
        model: Its layers are asked at each step: sharing it among processes replaces parameters.
    """
    matrices = {id(matrix) for matrix in mixing_matrices(model)}
    layers: list[Any] = [
        module for module in model.modules() if id(getattr(module, "mixing", None)) in matrices
    ]

    @torch.no_grad()
    def clip(*_: Any) -> None:
        for mixing in held(layer.mixing for layer in layers):
            mixing.clamp_(0, 1)

    if layers:
        optimizer.register_step_post_hook(clip)


def train_only_mhla(model: nn.Module) -> None:
    """Freeze everything but what MHLA added to the layers of a model."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, AddedAttention):
            module.requires_grad_(True)
            if module.mixing is not None:
                module.mixing.requires_grad_(module.config.mixing_learnable)
