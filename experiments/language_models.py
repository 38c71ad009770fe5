"""The models of language.py: their sizes and attentions, training, and loss by position."""

from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from language_text import END_OF_FILE
from transformers import LlamaConfig, LlamaForCausalLM

from mhla_gen import CausalMHLAConfig
from mhla_gen.models.language import MHLALanguageModel
from mhla_gen.runtime.recorded_training import RecordedTraining

EDGES = (0, 64, 256, 512, 1024, 2048, 4096, 8192)


class Sizes(NamedTuple):
    """Sizes of models and of training."""

    hidden_size: int = 320
    layers: int = 8
    heads: int = 5
    seq_len: int = 1024
    batch: int = 32
    steps: int = 400
    more_steps: int = 100
    """Steps of the arms that start from a trained softmax model."""
    window: int = 128
    block_size: int = 64
    held_out: int = 96
    """Number of windows of held-out text."""
    longest: int = 8192
    """Tokens per window."""


SMALL = Sizes(64, 3, 2, 256, 8, 800, 150, 32, 16, 24, 2048)
TINY = Sizes(32, 2, 2, 64, 4, 3, 2, 16, 8, 2, 256)
SIZES = {"full": Sizes(), "small": SMALL, "tiny": TINY}


def attentions(sizes: Sizes, start: float) -> dict[str, CausalMHLAConfig | None]:
    """The arms. `start` is the weight of the window before training."""
    block, distances = sizes.block_size, sizes.seq_len // sizes.block_size
    mhla = {"block_size": block, "num_blocks": distances}
    window = {"window": sizes.window, "exact_start": start}
    return {
        "softmax": None,
        "linear": CausalMHLAConfig(block_size=block, num_blocks=1, mixing_learnable=False),
        "mhla": CausalMHLAConfig(**mhla),
        "mhla + window": CausalMHLAConfig(**mhla, **window),
        "window": CausalMHLAConfig(**window, linear=False),
    }


NAMES = tuple(attentions(SMALL, 0.5))


def build(sizes: Sizes, seed: int) -> LlamaForCausalLM:
    """A Llama with new weights, the same for all arms of a seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.longest,
        bos_token_id=None,
        eos_token_id=END_OF_FILE,
    )
    return LlamaForCausalLM(config)


def train(model: Any, text: torch.Tensor, sizes: Sizes, steps: int, rate: float, seed: int) -> None:
    """Train with AdamW, a warm-up and a cosine; batches depend on the seed only."""
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "log_weights" not in n]
    ids = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    warm_up = max(1, steps // 20)
    model.train()

    def mean_loss(tokens: torch.Tensor) -> torch.Tensor:
        with autocast(tokens):
            return losses(model, tokens).mean()

    # A small model takes longer to launch than to run. Softmax layers would get another kernel,
    # because transformers gives them a mask of all pairs while it is recorded.
    records = text.is_cuda and isinstance(model, MHLALanguageModel)
    compute = RecordedTraining(model, mean_loss) if records else mean_loss
    for step in range(steps):
        place = min(1.0, (step + 1) / warm_up)
        cosine = 0.55 + 0.45 * np.cos(np.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * place * cosine
        starts = torch.randint(len(text) - sizes.seq_len, (sizes.batch, 1), generator=generator)
        index = (starts + torch.arange(sizes.seq_len + 1)).to(text.device, non_blocking=True)
        loss = compute(text[index])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"    step {step}: {loss.item() / np.log(2):.3f} bits a byte", flush=True)
    if isinstance(compute, RecordedTraining):
        compute.forget()


def losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Nats of every token after the first, float32 `[batch, seq_len]`."""
    tokens = tokens.long()
    logits = model(tokens[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(
        len(tokens), -1
    )


def autocast(tensor: torch.Tensor) -> Any:
    """bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if tensor.is_cuda else nullcontext()


@torch.no_grad()
def measure(model: Any, windows: torch.Tensor, sizes: Sizes) -> dict[str, Any]:
    """Bits per byte for each window: by position, and of the last bytes by context length.

    The same bytes, the last half of a training length, are read with a context of one training
    length, of two, and so on, so that only the more distant context differs.
    """
    model.eval()
    asked = sizes.seq_len // 2
    given = [sizes.seq_len]
    while given[-1] < sizes.longest:
        given.append(given[-1] * 2)
    edges = [e for e in EDGES if e <= sizes.longest]
    by_position, by_given = [], {length: [] for length in given}
    with autocast(windows):
        for batch in windows.split(8):
            for length in given:
                bits = losses(model, batch[:, -length - 1 :]) / np.log(2)
                by_given[length].append(bits[:, -asked:].mean(dim=1))
            by_position.append(bits)
    bits = torch.cat(by_position)
    parts = [bits[:, a:b].mean(dim=1) for a, b in pairwise(edges)]
    return {
        "edges": edges,
        "by_position": torch.stack(parts, dim=1).tolist(),
        "asked": asked,
        "given": given,
        "by_given": torch.stack([torch.cat(by_given[n]) for n in given], dim=1).tolist(),
        "curve": bits.mean(dim=0).unflatten(0, (-1, sizes.seq_len // 16)).mean(dim=1).tolist(),
    }
