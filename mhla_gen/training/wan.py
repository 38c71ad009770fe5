"""Wan for clips with captions: the model, and what it learns."""

from typing import Any

from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from mhla_gen.config import ObjectiveConfig, TrainConfig, WanConfig
from mhla_gen.data import TrainingData
from mhla_gen.data.caching.cached import CachedLatents
from mhla_gen.errors import UserError
from mhla_gen.models.families.wan import TEXT_LENGTH_WITH_IMAGE
from mhla_gen.models.frame_causal import causal_frames
from mhla_gen.training.clip_objectives import ChunkMatching, ClipMatching
from mhla_gen.training.lora import add_lora, merged
from mhla_gen.training.new_model import new_transformer
from mhla_gen.training.pretrained import load_pretrained
from mhla_gen.training.task import Task, times
from mhla_gen.training.wan_captions import attend_in_groups
from mhla_gen.training.wan_conditions import WanConditions
from mhla_gen.training.wan_pipeline import ClipExamples, ClipSamples, WanParts, sampling_of

# Channels of an image-to-video model beside noisy and known latents: see `first_frame_mask`.
_MASK_CHANNELS = 4
# Between Wan 2.2's experts, of text to video and of image to video.
_BOUNDARY, _BOUNDARY_WITH_IMAGE = 0.875, 0.9
_WAN_FPS = 16.0


def wan_task(config: TrainConfig, wan: WanConfig, data: TrainingData) -> Task:
    """A Wan transformer for clips with embedded captions.

    Args:
        config: Settings.
        wan: Those of them that are about Wan.
        data: A cache of clips, or another data set with `prompt_embeds` and
            `empty_prompt_embeds`; image-sized clips have one frame.

    Raises:
        ValueError: If settings, data and a pretrained model do not fit together.
    """
    empty = _empty_prompt(data)
    _check(config, wan, data)
    parts = WanParts(config, wan, data)
    by_token = parts.times_of_tokens
    model = _build_model(config, wan, data, empty.shape[-1], by_token)
    sees_image = model.config.image_dim is not None
    if sees_image and len(empty) != TEXT_LENGTH_WITH_IMAGE:
        raise UserError(
            "a Wan that reads an image beside the caption takes captions of "
            f"{TEXT_LENGTH_WITH_IMAGE} tokens, found {len(empty)}; build the cache again with "
            f"text.max_sequence_length={TEXT_LENGTH_WITH_IMAGE}"
        )
    chunk_frames = causal_frames(model)
    if chunk_frames is not None:
        _check_causal(wan)
    if config.model.trainable == "lora":
        add_lora(model, wan)
    attend_in_groups(model)
    patch_size = tuple(model.config.patch_size)
    conditioning = WanConditions(
        empty, patch_size, by_token, wan.first_frame, chunk_frames, image_embeds=sees_image
    )
    # Where clips keep the rates of their files, that of Wan.
    fps = getattr(data, "fps", None) or _WAN_FPS
    examples = None
    if parts.has_autoencoder and isinstance(data, CachedLatents):
        examples = ClipExamples(data, empty, wan).write
    return Task(
        model=model,
        objective=(
            _objective(config.objective, wan, parts.boundary, by_token)
            if chunk_frames is None
            else _by_chunk(config.objective, chunk_frames, data)
        ),
        conditioning=conditioning,
        pipeline=parts.pipeline,
        finished=merged if config.model.trainable == "lora" else None,
        sampler=ClipSamples(data, empty, wan) if parts.has_autoencoder else None,
        sampling=sampling_of(config, data, fps),
        examples=examples,
        samples="clips",
        fps=fps,
        gathered=("WanTimeTextImageEmbedding",),
        summary=f"{len(data)} clips, latents {', '.join(map(times, data.sample_shapes))}",
    )


def _empty_prompt(data: TrainingData) -> Tensor:
    empty = getattr(data, "empty_prompt_embeds", None)
    if empty is None:
        raise UserError(
            "wan learns from clips with embedded captions: data.source=cache with what `mhla-gen "
            "cache` wrote of data.source=clips"
        )
    return empty


def _check(config: TrainConfig, wan: WanConfig, data: TrainingData) -> None:
    for shape in data.sample_shapes:
        if len(shape) != 4:
            raise UserError(
                f"wan takes latents of clips, found {times(shape)}; cache data.source=clips"
            )
        if shape[2] % 2 or shape[3] % 2:
            raise UserError(
                f"wan's tokens are 2 × 2 latents, which do not tile {times(shape)}; take clips "
                "whose sides are multiples of 16 pixels (32 for Wan 2.2's 5B)"
            )
    if config.objective.name != "flow_matching":
        raise UserError(f"wan needs objective.name=flow_matching, found {config.objective.name}")
    if wan.first_frame and config.data.horizontal_flip:
        raise UserError("wan.first_frame needs data.horizontal_flip=false")


def _objective(
    config: ObjectiveConfig, wan: WanConfig, boundary: float | None, by_token: bool
) -> ClipMatching:
    lowest, highest = 0.0, 1.0
    if wan.expert is not None:
        edge = boundary or (_BOUNDARY_WITH_IMAGE if wan.first_frame else _BOUNDARY)
        lowest, highest = (edge, 1.0) if wan.expert == "high_noise" else (0.0, edge)
    return ClipMatching(
        config.logit_mean,
        config.logit_std,
        config.shift,
        config.min_snr_gamma,
        lowest=lowest,
        highest=highest,
        skips_first_frame=wan.first_frame and by_token,
    )


def _check_causal(wan: WanConfig) -> None:
    if wan.first_frame or wan.expert is not None or wan.times_of_tokens is False:
        raise UserError(
            "a model that is causal over frames (causal_frames) learns text to video with times of "
            "its own for every chunk: set wan.first_frame=false, wan.expert=null and "
            "wan.times_of_tokens=null"
        )


def _by_chunk(config: ObjectiveConfig, chunk_frames: int, data: TrainingData) -> ChunkMatching:
    return ChunkMatching(
        config.logit_mean,
        config.logit_std,
        config.shift,
        config.min_snr_gamma,
        chunk_frames=chunk_frames,
        num_chunks=max(-(-shape[1] // chunk_frames) for shape in data.sample_shapes),
    )


def _build_model(
    config: TrainConfig, wan: WanConfig, data: TrainingData, text_dim: int, by_token: bool
) -> Any:
    (channels,) = {shape[0] for shape in data.sample_shapes}
    concatenated = wan.first_frame and not by_token
    if concatenated and not getattr(data, "has_condition", False):
        raise UserError(
            "wan.first_frame needs a cache with clips.condition=true, or times_of_tokens=true for "
            "a model like Wan 2.2's TI2V-5B"
        )
    image_dim = _image_dim(data)
    wanted = {
        "in_channels": 2 * channels + _MASK_CHANNELS if concatenated else channels,
        "out_channels": channels,
        "text_dim": text_dim,
    }
    if config.model.pretrained is None:
        sizes: dict[str, Any] = wanted | wan.sizes
        if concatenated and image_dim is not None:
            # As in Wan 2.1: the projections of the image take what the image embedder makes.
            hidden_size = sizes["num_attention_heads"] * sizes["attention_head_dim"]
            sizes |= {"image_dim": image_dim, "added_kv_proj_dim": hidden_size}
        return new_transformer(config.model, WanTransformer3DModel, sizes, "the sizes in wan")
    model: Any = load_pretrained(config.model, wan.subfolder)
    if not isinstance(model, WanTransformer3DModel):
        raise UserError(
            f"wan needs a Wan, found a {type(model).__name__} in {config.model.pretrained}; leave "
            "wan out, and take transformer={} for a model that learns from captions"
        )
    found: Any = model.config
    if found.image_dim is not None:
        _check_image(str(config.model.pretrained), found, image_dim)
    wrong = [
        f"{k} is {found[k]}, but the data need {v}" for k, v in wanted.items() if found[k] != v
    ]
    if wrong:
        hint = "; see wan.first_frame" if found.in_channels != wanted["in_channels"] else ""
        raise UserError(f"{config.model.pretrained} does not fit: {'; '.join(wrong)}{hint}")
    return model


def _check_image(name: str, found: Any, image_dim: int | None) -> None:
    """Raise unless the data have what an image-to-video model of Wan 2.1 reads."""
    if found.pos_embed_seq_len is not None:
        raise UserError(
            f"{name} reads a first and a last frame, and caches hold the first; take a model of "
            "image to video"
        )
    if image_dim is None:
        raise UserError(
            f"{name} reads CLIP's embedding of the first frame, which the data do not hold; build "
            "the cache again, in a new folder, with clips.condition=true and "
            "image_encoder.path=PIPELINE, the pipeline of this model"
        )
    if found.image_dim != image_dim:
        raise UserError(
            f"{name} does not fit: image_dim is {found.image_dim}, but the data need {image_dim}"
        )


def _image_dim(data: TrainingData) -> int | None:
    """Channels of embedded first frames, where the data have them."""
    if not getattr(data, "has_image_embeds", False):
        return None
    return data.read([data.buckets[0][0]])["image_embeds"].shape[-1]
