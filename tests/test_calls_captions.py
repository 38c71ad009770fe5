"""Embedded captions: a cache holds what a pipeline makes of the same prompt."""

import pytest
import torch
from test_calls import alike, recorded
from tiny import tiny_tokenizer
from tiny_calls import CALLED, called
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from mhla_gen.data.captions import CaptionEncoder

WORDS = ["a red square moves", "a square", ""]
LAYERS = {"vocab_size": 11, "num_hidden_layers": 3, "num_attention_heads": 2}


def t5(channels):
    sizes = {"vocab_size": 11, "d_model": channels, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    return {"text": T5EncoderModel(T5Config(**sizes, num_heads=2)), "tokens": tokenizer()}


def clip(channels, projected=False):
    sizes = LAYERS | {"hidden_size": channels, "intermediate_size": 16, "eos_token_id": 2}
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    config = CLIPTextConfig(**sizes, projection_dim=channels)
    return {"text": kind(config), "tokens": tokenizer(77)}


def language(kind, config, channels, **changes):
    sizes = LAYERS | {"hidden_size": channels, "intermediate_size": 16}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048}
    found = tokenizer()
    found.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return {"text": kind(config(**sizes | changes)), "tokens": found}


def tokenizer(length=512):
    found = tiny_tokenizer()
    found.model_max_length = length
    return found


def bert():
    config = BertConfig(**LAYERS, hidden_size=12, intermediate_size=16)
    return {"text": BertModel(config), "tokens": tokenizer(77)}


# Text encoders of each pipeline, and changes of its tiny transformer.
ENCODERS = {
    "sd3": lambda: ([clip(4, True), clip(4, True), t5(16)], {"joint_attention_dim": 16}),
    "flux": lambda: ([clip(8), t5(16)], {}),
    "hunyuan_dit": lambda: ([bert(), t5(16)], {"text_len": 77, "text_len_t5": 256}),
    "pixart": lambda: ([t5(12)], {}),
    "sana": lambda: ([language(Gemma2Model, Gemma2Config, 12)], {}),
    "z_image": lambda: ([language(Qwen3Model, Qwen3Config, 16)], {}),
    "cogvideox": lambda: ([t5(16)], {"max_text_seq_length": 226}),
    "hunyuan_video": lambda: (
        [language(LlamaModel, LlamaConfig, 16), clip(8)],
        {"guidance_embeds": True},
    ),
    "ltx": lambda: ([t5(16)], {}),
    "mochi": lambda: ([t5(16)], {"max_sequence_length": 256}),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_captions_are_embedded_as_the_pipeline_does(name):
    torch.manual_seed(0)
    encoders, changes = ENCODERS[name]()
    model, kind, _ = called(name, **changes)
    made, settings = kind.scheduler
    parts = {"scheduler": made(**settings)}
    for number, part in enumerate(encoders, 1):
        end = "" if number == 1 else f"_{number}"
        parts |= {f"text_encoder{end}": part["text"].eval(), f"tokenizer{end}": part["tokens"]}
    call = kind(kind.assemble(model, **parts))
    rows = CaptionEncoder(call, None).embed(WORDS)
    assert len(rows) == 3 and rows[0].keys() == {r.name for r in kind.text.values()}
    options = {"num_inference_steps": 4, "guidance_scale": float(name != "z_image")}
    options |= {"height": 64, "width": 64, "num_frames": 9, "use_resolution_binning": False}
    options = {key: value for key, value in options.items() if call.takes(key)}
    theirs = recorded(call.pipe, {"prompt": WORDS[0], **options})
    latents = torch.randn(1, call.channels(model.config), *CALLED[name][1])
    text = {key: value[None] for key, value in rows[0].items()}
    ours = call.arguments(latents, torch.tensor([1000.0]), text)
    names = [argument for argument in kind.text if argument in theirs]
    assert names
    for argument in names:
        alike(ours[argument], theirs[argument])


def test_kandinsky_embeds_a_caption_alike_beside_longer_ones():
    """Its pipeline pads to the longest caption of a batch, without a mask."""
    torch.manual_seed(0)
    words, pooled = language(Qwen3Model, Qwen3Config, 16), clip(10)
    model, kind, _ = called("kandinsky5")
    parts = {"text_encoder": words["text"].eval(), "tokenizer": words["tokens"]}
    parts |= {"text_encoder_2": pooled["text"].eval(), "tokenizer_2": pooled["tokens"]}
    pipe = kind.assemble(model, scheduler=kind.scheduler[0](), **parts)
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = "{} a", 0
    encoder = CaptionEncoder(kind(pipe), None)
    together, alone = encoder.embed(WORDS), [encoder.embed([word])[0] for word in WORDS]
    assert len({len(row["prompt_embeds_qwen"]) for row in alone}) == 3
    for row, expected in zip(together, alone, strict=True):
        assert row.keys() == expected.keys()
        for name, value in row.items():
            torch.testing.assert_close(value, expected[name])
