"""Why some classes of diffusers are not supported: the tables of docs/models.md, for messages.

A test compares the two.
"""
# ruff: noqa: E501 - rows of a table stay whole.

from typing import Any

_UNWRITTEN = {
    "AceStepTransformer1DModel": "1-D; repeat grouped keys and values, half-split rotary; leave sliding-window layers alone",
    "AllegroTransformer3DModel": "rotary embedding per third of a head, half-split, with token positions; grid from the model's input",
    "AnyFlowTransformer3DModel": "as Wan, with complex rotary tables in a dict that can carry the grid",
    "ChronoEditTransformer3DModel": "as Wan, on its own copies of Wan's classes",
    "Kandinsky6Transformer3DModel": "video blocks as Kandinsky 5, audio blocks 1-D: two ranks in one model; the grid must join the rotary table",
    "Kandinsky6SRTransformer3DModel": "replace NABLA, which is all its attention; bring tokens from tiles of 8 × 8 back to raster order",
    "LatteTransformer3DModel": "spatial blocks 2-D, temporal blocks 1-D: two ranks in one model; no argument carries a grid",
    "LuminaNextDiT2DModel": "return heads, because text attention joins before the output projection; grouped keys; no padded images",
    "MiniMaxMusic3Transformer1DModel": "1-D with the timestep as first token; rotary over part of a head",
    "StableAudioDiTModel": "1-D with a global token first; rotary over half a head, half-split",
    "T5FilmDecoder": "1-D spectrogram frames, no rotary; a legacy model with short sequences, so little to win",
    "AuraFlowTransformer2DModel": "text and image tokens in one attention",
    "BriaFiboTransformer2DModel": "text and image tokens in one attention",
    "BriaTransformer2DModel": "text and image tokens in one attention",
    "ChromaTransformer2DModel": "text and image tokens in one attention",
    "CogView3PlusTransformer2DModel": "text and image tokens in one attention",
    "CogView4Transformer2DModel": "text and image tokens in one attention",
    "ConsisIDTransformer3DModel": "text and video tokens in one attention",
    "EasyAnimateTransformer3DModel": "text and video tokens in one attention",
    "ErnieImageTransformer2DModel": "text and image tokens in one attention",
    "HiDreamImageTransformer2DModel": "text and image tokens in one attention",
    "HunyuanImageTransformer2DModel": "text and image tokens in one attention",
    "JoyImageEditTransformer3DModel": "text and image tokens in one attention",
    "LongCatImageTransformer2DModel": "text and image tokens in one attention",
    "Lumina2Transformer2DModel": "text and image tokens in one attention",
    "MotifVideoTransformer3DModel": "text and video tokens in one attention",
    "NucleusMoEImageTransformer2DModel": "image queries read image and text keys in one softmax",
    "OvisImageTransformer2DModel": "text and image tokens in one attention",
    "PRXTransformer2DModel": "image queries read image and text keys in one softmax",
}
"""Classes whose self-attention fits but has no family here, and what one would have to do."""
_IN_PART = {
    "Flux3Transformer2DModel": 'mode_blocks["image"] see image tokens only; the other blocks join text and image',
    "LongCatAudioDiTTransformer": "1-D self-attention, but its pipeline masks padded audio: only for batches of one length",
    "Transformer2DModel": "as a whole model it is the old name of DiT and PixArt: load those classes; otherwise a part of UNets",
}
_UNFIT = {
    "BriaFibo2Transformer2DModel": "tokens of several images, padding and a text summary in one attention, with a mask",
    "Cosmos3OmniTransformer": "packed text (causal), image, video and action tokens",
    "GlmImageTransformer2DModel": "text and image tokens in one attention, with a cache of keys",
    "HunyuanVideoFramepackTransformer3DModel": "text, video and history at several resolutions in one attention",
    "Ideogram4Transformer2DModel": "text and image tokens packed in one sequence, with a mask",
    "JoyImageEditPlusTransformer3DModel": "text and image tokens in one attention",
    "Krea2Transformer2DModel": "text and image tokens in one attention",
    "MiniMaxH3Transformer3DModel": "text, image, video and audio tokens packed in one sequence",
    "OmniGenTransformer2DModel": "text and image tokens in one attention, with a mask",
    "QwenImage21Transformer2DModel": "text and image tokens in one attention, with a cache of keys",
    "AnyFlowFARTransformer3DModel": "causal over frames, with a cache of compressed frames",
    "HeliosTransformer3DModel": "history at three resolutions precedes the video: tokens of several grids",
    "SanaWMLTX2RefinerTransformer3DModel": "reads cached keys of earlier chunks",
    "WanAnimate2Transformer3DModel": "reads cached keys of a reference video through a block mask",
    "SanaWMTransformer3DModel": "its own gated delta rule over time, with camera transforms per ray",
    "StableAudio3DiTModel": "differential attention: the difference of two softmax maps, from five fused projections",
    "RFD4ProteinaTransformer": "a learned bias of token pairs is added to the scores",
    "MiniMaxMusic3RVQDepthDecoder": "causal over a few codebooks",
    "PriorTransformer": "a short causal sequence of embeddings",
    "DreamLiteTransformer2DModel": "part of a UNet, not a model of its own",
    "DualTransformer2DModel": "part of a UNet, not a model of its own",
    "TransformerTemporalModel": "part of a UNet, not a model of its own",
    "TransformerSpatioTemporalModel": "part of a UNet, not a model of its own",
}
REASONS: dict[str, str] = {
    **{name: f"fits, but no adapter is written: {what}" for name, what in _UNWRITTEN.items()},
    **{name: f"fits in part only: {what}" for name, what in _IN_PART.items()},
    **{name: f"does not fit: {why}" for name, why in _UNFIT.items()},
}
"""By the name of the class."""


def reason_of(model: Any) -> str | None:
    """Why a model cannot be converted, if its class is known."""
    name = type(model).__name__
    if name in REASONS:
        return f"{name} {REASONS[name]}"
    if name.startswith("UNet"):
        return f"{name} does not fit: a UNet attends at several resolutions between convolutions"
    return None
