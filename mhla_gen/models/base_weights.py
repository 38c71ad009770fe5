"""Digests of a model's weights, from a few values of each, to detect that two bases differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2s
from typing import Any, Self

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

_VALUES = 64


@dataclass(frozen=True)
class BaseWeights:
    """Digests of a model's own weights, without those of MHLA and LoRA.

    A digest covers up to 64 values spread over the tensor, rounded to bfloat16, so that it is fast
    and independent of the dtype the model was loaded in. Quantized weights have no digest.
    """

    digests: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Digests of a model's weights, on any device."""
        return cls({name: _digest(tensor) for name, tensor in sorted(_weights(model))})

    def different(self, others: Mapping[str, str]) -> list[str]:
        """Names of the weights that both have but with different values."""
        common = self.digests.keys() & others.keys()
        return sorted(name for name in common if self.digests[name] != others[name])


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if ".mhla" in f".{path}" or ".lora_" in path:
            continue
        if has_offloaded_params(module):
            with align_module_device(module, torch.device("cpu")):
                yield from _own(path, module)
        else:
            yield from _own(path, module)


def _own(path: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    path = path.replace(".base_layer", "")
    for name, parameter in module.named_parameters(recurse=False):
        # Quantizers have tensor classes of their own, or integers.
        plain = type(parameter.data) is Tensor and parameter.is_floating_point()
        if plain and not parameter.is_meta:
            yield f"{path}.{name}".removeprefix("."), parameter.detach()


def _digest(tensor: Tensor) -> str:
    flat = tensor.reshape(-1)
    # On the CPU, since a GPU may round otherwise; in float32, the last place may be one too large.
    places = torch.linspace(0, len(flat) - 1, min(_VALUES, len(flat)), device="cpu").long()
    values = (
        flat[places.clamp(max=len(flat) - 1).to(flat.device)]
        .to(torch.bfloat16)
        .cpu()
        .contiguous()
        .view(torch.int16)
    )
    shape = str(list(tensor.shape)).encode()
    return blake2s(shape + values.numpy().tobytes(), digest_size=4).hexdigest()
