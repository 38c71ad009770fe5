"""DiT's initial weights; diffusers' class has PyTorch's defaults."""

from typing import Any

from torch import nn

from mhla_gen.models.families.dit import disable_label_dropout


def initialize_dit(model: Any) -> None:
    """Give a new DiT its own initialisation, in place.

    Every block starts as the identity and the output as zero (adaLN-zero). diffusers keeps a copy
    of the timestep and label embedders in every block, where DiT has one: they start equal here and
    then learn apart. Their label dropout is switched off: it draws other labels in every block, and
    training drops labels itself, once. MHLA's parameters keep the start that their module gives
    them.

    Args:
        model: A DiT, with any attention.

    Source:
        Peebles and Xie 2023, arXiv:2212.09748, §3.2; facebookresearch/DiT, models.py.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".mhla." not in name:
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                nn.init.zeros_(module.bias)
    patches = model.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    nn.init.zeros_(patches.bias)

    first = model.transformer_blocks[0].norm1.emb
    nn.init.normal_(first.class_embedder.embedding_table.weight, std=0.02)
    nn.init.normal_(first.timestep_embedder.linear_1.weight, std=0.02)
    nn.init.normal_(first.timestep_embedder.linear_2.weight, std=0.02)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
    disable_label_dropout(model)
