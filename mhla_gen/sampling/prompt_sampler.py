"""Samples from prompts: any diffusers pipeline for text or images to images or videos."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import is_ftfy_available
from PIL import Image
from torch import Tensor

from mhla_gen.calls import call_class_of_pipeline
from mhla_gen.data.buckets import Bucket, crop_for
from mhla_gen.errors import MissingError, UserError
from mhla_gen.media.frames import cropped
from mhla_gen.media.pictures import UnreadableImageError, read_rgb
from mhla_gen.models.families.wan import TEXT_LENGTH_WITH_IMAGE
from mhla_gen.pipelines.clip_stream import chunk_lengths, stream_clip, streams
from mhla_gen.pipelines.noise import generator_of, sample_seed
from mhla_gen.sampling.embeds import NEGATIVE
from mhla_gen.sampling.prompts import Prompt
from mhla_gen.sampling.samplers import OnStep, Steps, require_finite, to_pixels
from mhla_gen.sampling.sizes import resolved_sizes, shape_of

_TITLE = 60
_SHEET_ROWS = 20


class PromptSampler:
    """Images or videos from prompts, `samples_per_prompt` of each."""

    model_batch_size = 1
    # Its text encoder and guidance call models with shapes that we do not know.
    one_call = True

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        samples_per_prompt: int = 1,
        embeds: Mapping[str, Tensor] | None = None,
        sizes: Mapping[str, int | None],
        **options: Any,
    ):
        """Take prompts and what the pipeline is called with.

        Args:
            pipeline: Of diffusers.
            prompts: With images if it is an image-to-video pipeline.
            seed: Of the set; prompts may have seeds of their own.
            samples_per_prompt: Samples of each prompt.
            embeds: `prompt_embeds` and `negative_prompt_embeds`, and what else the pipeline embeds
                prompts to, in place of a text encoder.
            sizes: height, width and num_frames; None takes the pipeline's own.
            options: Further arguments of the pipeline, such as `guidance_scale`.

        Raises:
            ValueError: If prompts, sizes and pipeline do not fit together.
        """
        self.pipeline, self.prompts, self.seed = pipeline, prompts, seed
        self.samples_per_prompt, self.embeds = samples_per_prompt, embeds
        self._arguments = inspect.signature(pipeline.__call__).parameters
        self.is_video = bool({"num_frames", "frames"} & set(self._arguments))
        image = self._arguments.get("image")  # Flux2Pipeline's is a reference, and optional
        self.takes_image = image is not None and image.default is inspect.Parameter.empty
        self.options = {k: v for k, v in options.items() if v is not None}
        unknown = [k for k in self.options if k not in self._arguments]
        if unknown:
            raise UserError(
                f"{type(pipeline).__name__} takes no {', '.join(unknown)}; leave that out"
            )
        self._check_prompts()
        self._sizes = resolved_sizes(pipeline, sizes)
        self.shape = shape_of(self._sizes)
        if "use_resolution_binning" in self._arguments and any(sizes.values()):
            # Else it would draw at the nearest of a list of sizes, and scale what it drew.
            self.options["use_resolution_binning"] = False
        self.num_chunks: int | None = None
        if streams(pipeline):
            self.num_chunks = len(chunk_lengths(pipeline, self._sizes["num_frames"]))
            if "guidance_scale_2" in self.options:
                raise UserError(
                    "guidance_scale_2 is of a second expert, and this pipeline has one expert; "
                    "leave it out"
                )

    def __len__(self) -> int:
        return len(self.prompts) * self.samples_per_prompt

    def draw(self, numbers: Sequence[int], steps: int, on_step: OnStep | None = None) -> Tensor:
        """See `Sampler`."""
        if (self.takes_image or self.num_chunks) and len(numbers) > 1:
            # Such a pipeline has one image, or one clip, for all samples of a call.
            return torch.cat([self.draw([number], steps, on_step) for number in numbers])
        if self.num_chunks:
            chunks = self.stream(numbers[0], steps, on_step=on_step)
            return torch.cat([pixels for _, pixels in chunks])[None]
        chosen = [self.prompts[i // self.samples_per_prompt] for i in numbers]
        if len({prompt.negative_prompt is None for prompt in chosen}) > 1:
            # A pipeline may have a negative prompt of its own, but not for some of a call.
            return torch.cat([self.draw([number], steps, on_step) for number in numbers])
        done = Steps(on_step)
        watched = "callback_on_step_end" in self._arguments
        result = self.pipeline(
            **self._texts(numbers, chosen),
            **({"image": self._first_frame(str(chosen[0].image))} if self.takes_image else {}),
            **self._sizes,
            **self.options,
            **({"callback_on_step_end": done} if watched else {}),
            num_inference_steps=steps,
            generator=[generator_of(self.seed_of(i)) for i in numbers],
            output_type="pt",
            return_dict=False,
        )[0]
        require_finite(self, numbers, result, done.latents)
        return to_pixels(result.float())

    def stream(
        self,
        number: int,
        steps: int,
        finished: Sequence[Tensor] = (),
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw a clip chunk by chunk.

        Args:
            number: Which sample.
            steps: Denoising steps.
            finished: Latents of its first chunks, as an earlier call gave them.
            on_step: Called with the number of steps done, as if all chunks were denoised at once.

        Yields:
            Latents of a chunk and its frames, uint8 `[frames, height, width, 3]`.

        Raises:
            NotFiniteError: If a chunk is NaN or infinite somewhere.
        """
        assert self.num_chunks is not None
        texts = self._texts([number], [self.prompts[number // self.samples_per_prompt]])
        texts = {k: v[0] if isinstance(v, list) else v for k, v in texts.items()}
        count, offset = self.num_chunks, steps * len(finished)
        done = None if on_step is None else lambda i: on_step((offset + i) / count)
        for latents, frames in stream_clip(
            self.pipeline,
            **texts,
            **self._sizes,
            **self.options,
            num_inference_steps=steps,
            seed=self.seed_of(number),
            finished=finished,
            on_step=done,
        ):
            require_finite(self, [number], frames[None], latents)
            yield latents, to_pixels(frames)

    def seed_of(self, number: int) -> int:
        """The seed of a sample, derived from its prompt's own or from that of the set."""
        prompt, repeat = divmod(number, self.samples_per_prompt)
        own = self.prompts[prompt].seed
        return sample_seed(self.seed, number) if own is None else sample_seed(own, repeat)

    def title(self, number: int) -> str:
        """See `Sampler`."""
        text = self.prompts[number // self.samples_per_prompt].prompt
        return text if len(text) <= _TITLE else f"{text[: _TITLE - 1]}…"

    def record(self, number: int) -> dict[str, Any]:
        """See `Sampler`."""
        prompt = self.prompts[number // self.samples_per_prompt]
        known = {
            "prompt": prompt.prompt,
            "negative_prompt": prompt.negative_prompt,
            "image": prompt.image,
            "seed": self.seed_of(number),
        }
        return {key: value for key, value in known.items() if value is not None}

    def rows(self) -> list[tuple[str, list[int]]]:
        """See `Sampler`."""
        each = self.samples_per_prompt
        if self.is_video:
            return [(self.title(i), [i]) for i in range(min(len(self), _SHEET_ROWS))]
        count = min(len(self.prompts), _SHEET_ROWS)
        return [(self.title(i * each), [*range(i * each, (i + 1) * each)]) for i in range(count)]

    def _texts(self, numbers: Sequence[int], chosen: Sequence[Prompt]) -> dict[str, Any]:
        if self.embeds is None:
            texts: dict[str, Any] = {"prompt": [p.prompt for p in chosen]}
            if chosen[0].negative_prompt is not None:
                texts["negative_prompt"] = [p.negative_prompt for p in chosen]
            return texts
        device = self.pipeline._execution_device
        found = {}
        for key, values in self.embeds.items():
            rows = [i // self.samples_per_prompt if len(values) > 1 else 0 for i in numbers]
            found[key] = values[rows].to(device)
        kind = call_class_of_pipeline(type(self.pipeline).__name__)
        if kind is None:
            return found
        negative = {k.removeprefix(NEGATIVE): v for k, v in found.items() if k.startswith(NEGATIVE)}
        captions = {k: v for k, v in found.items() if not k.startswith(NEGATIVE)}
        return kind(self.pipeline).texts(captions, negative or None)

    def _first_frame(self, path: str) -> Image.Image:
        """An image, scaled and cropped to the size of the video as first frames of a cache are."""
        pixels = read_rgb(Path(path))
        height, width = self.shape[-3:-1]
        crop = crop_for(Bucket(1, height, width), *pixels.shape[:2])
        return Image.fromarray(cropped(pixels, crop))

    def _check_prompts(self) -> None:
        name = type(self.pipeline).__name__
        for number, prompt in enumerate(self.prompts):
            if self.takes_image and prompt.image is None:
                raise UserError(
                    f"{name} needs an image; prompt {number} has none, and image= is not set"
                )
            if prompt.image is not None and not self.takes_image:
                raise UserError(
                    f"prompt {number} has an image, but {name} takes none; leave it out"
                )
            if prompt.negative_prompt is not None and "negative_prompt" not in self._arguments:
                raise UserError(f"{name} takes no negative_prompt; leave it out")
        for number, prompt in enumerate(self.prompts):
            if prompt.image is not None:
                _check_readable(number, prompt.image)
        if self.embeds is not None and self.takes_image:
            self._check_embeds(name, self.embeds)
        if self.embeds is None and getattr(self.pipeline, "text_encoder", None) is None:
            raise UserError(f"this {name} has no text encoder; give prompt_embeds=FILE")
        # diffusers 0.42 calls it there without asking whether it is installed.
        if self.embeds is None and name == "WanImageToVideoPipeline" and not is_ftfy_available():
            raise UserError(f"{name} cleans prompts with ftfy: pip install ftfy")

    def _check_embeds(self, name: str, embeds: Mapping[str, Tensor]) -> None:
        lengths = {values.shape[1] for values in embeds.values()} - {TEXT_LENGTH_WITH_IMAGE}
        if lengths and getattr(self.pipeline.transformer.config, "image_dim", None) is not None:
            raise UserError(
                f"this {name} takes prompt_embeds of {TEXT_LENGTH_WITH_IMAGE} tokens, found "
                f"{lengths.pop()}; pad them with zeros"
            )


def _check_readable(number: int, path: str) -> None:
    if not Path(path).is_file():
        raise MissingError(f"image {path} of prompt {number} does not exist")
    try:
        read_rgb(Path(path))
    except UnreadableImageError as error:
        raise UserError(f"image {path} of prompt {number} {error}") from error
