"""The optimizer, and the rules for mixing matrices that hold wherever it is used."""

from typing import Any

import torch
from torch import nn

from mhla_gen.models.additions import AddedAttention


def mixing_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable mixing matrices of all MHLA layers."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[-1] == "mixing" and parameter.requires_grad
    ]


def mhla_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All that MHLA layers added to a model, mixing included."""
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
) -> torch.optim.AdamW:
    """AdamW that keeps the model's mixing matrices in [0, 1] after every step."""
    groups = parameter_groups(model, weight_decay, mixing_learning_rate, mhla_learning_rate)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), fused=True)
    keep_mixing_in_range(optimizer, model)
    return optimizer


def keep_mixing_in_range(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Clip a model's mixing matrices to [0, 1] after each step of an optimizer, whoever calls it.

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
        for layer in layers:
            layer.mixing.clamp_(0, 1)

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
