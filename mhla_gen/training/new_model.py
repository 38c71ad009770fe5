"""New transformers: sizes that are a mistake are refused before they fill the memory."""

from typing import Any

import psutil
import torch

from mhla_gen.config import ModelConfig
from mhla_gen.errors import UserError, one_line
from mhla_gen.models.families import MHLA_CLASSES
from mhla_gen.training.pretrained import attention_settings

_GIB = 2**30


def new_transformer(config: ModelConfig, base: Any, sizes: dict[str, Any], group: str) -> Any:
    """A new model with the chosen attention.

    Args:
        config: Which attention.
        base: Its softmax class in diffusers.
        sizes: Arguments of that class.
        group: Where they are in a config, for messages.

    Raises:
        ValueError: If diffusers builds no model of these sizes, or none that fits this machine.
    """
    check_sizes(base, sizes, group)
    if config.attention == "softmax":
        return base(**sizes)
    made: Any = MHLA_CLASSES[base]
    return made(**sizes, mhla=attention_settings(config, made.family.rank))


def check_sizes(base: Any, sizes: dict[str, Any], group: str) -> None:
    """Raise unless a model of these sizes can be built here; takes no memory for its weights.

    Args:
        base: Its class.
        sizes: Arguments of the class.
        group: Where they are in a config, for messages.

    Raises:
        ValueError: If the class refuses them, or its weights take more memory than this machine
            has, swap included.
    """
    in_memory = torch.get_default_device().type == "cpu"
    try:
        with torch.device("meta"):
            model = base(**sizes)
    # What is wrong with sizes is said in as many classes as there are models.
    except Exception as error:
        said = one_line(str(error), most=300) or type(error).__name__
        raise UserError(f"{group} do not fit {base.__name__}: {said}") from error
    if not in_memory:
        return
    needed, there = model.get_memory_footprint(), psutil.virtual_memory().total
    if needed > there:
        # Not asked before, as psutil warns where a container does not tell.
        there += psutil.swap_memory().total
    if needed > there:
        raise UserError(
            f"{group} are too large: the weights of this {base.__name__} take "
            f"{needed / _GIB:,.0f} GiB, and this machine has {there / _GIB:.0f}, with swap; take "
            "fewer layers, heads or channels"
        )
