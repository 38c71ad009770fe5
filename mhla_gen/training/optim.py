"""The optimizer, and the rules for mixing matrices that hold wherever it is used."""

from typing import Any

import torch
from torch import nn

from mhla_gen.models import MHLA


def mixing_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable mixing matrices of all MHLA layers."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[-1] == "mixing" and parameter.requires_grad
    ]


def parameter_groups(
    model: nn.Module, weight_decay: float, mixing_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with and without weight decay.

    Mixing matrices are a third group if they have a learning rate of their own.

    Weight matrices and convolutions decay. Biases, norms, embedding tables and mixing matrices do
    not: decay would pull a mixing matrix, whose entries are weights of an average, to zero.
    """
    mixing = {id(parameter) for parameter in mixing_matrices(model)}
    exempt = set(mixing)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            exempt.add(id(module.weight))
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in exempt]
    others = [p for p in trained if p.ndim < 2 or id(p) in exempt]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if mixing_learning_rate is not None and mixing:
        own = [p for p in others if id(p) in mixing]
        groups[1]["params"] = [p for p in others if id(p) not in mixing]
        groups.append({"params": own, "weight_decay": 0.0, "lr": mixing_learning_rate})
    return groups


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    mixing_learning_rate: float | None = None,
) -> torch.optim.AdamW:
    """AdamW that keeps the model's mixing matrices in [0, 1] after every step."""
    groups = parameter_groups(model, weight_decay, mixing_learning_rate)
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
        if isinstance(module, MHLA):
            module.requires_grad_(True)
            if module.mixing is not None:
                module.mixing.requires_grad_(module.config.mixing_learnable)
