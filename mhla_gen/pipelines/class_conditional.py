"""A diffusers pipeline for class-conditional DiTs with any number of classes."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiTTransformer2DModel,
    SchedulerMixin,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mhla_gen.data.autoencoder import compression, latent_normalisation
from mhla_gen.errors import UserError
from mhla_gen.models import MHLADiTTransformer2DModel, OriginalDiTTransformer2DModel
from mhla_gen.pipelines.classes import Classes, class_numbers, label_tensor
from mhla_gen.pipelines.guidance import Guidance
from mhla_gen.pipelines.noise import noise_of
from mhla_gen.pipelines.schedulers import (
    check_scheduler,
    learns_variance,
    makes_variance,
    prediction_of,
)
from mhla_gen.runtime.devices import send

# diffusers' `from_pipe` takes over a model only if its very class is named here.
Transformer = DiTTransformer2DModel | MHLADiTTransformer2DModel | OriginalDiTTransformer2DModel
Autoencoder = AutoencoderKL | AutoencoderDC | AutoencoderTiny
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


class ClassConditionalPipeline(DiffusionPipeline):
    """Images of given classes from a DiT, in pixel space or through a VAE.

    diffusers' `DiTPipeline` takes class 1000 for "no class"; here it is the number after the last
    class, whatever that is.

    Args:
        transformer: A `DiTTransformer2DModel` or a subclass. One with twice as many output as input
            channels predicts a variance, too.
        scheduler: Any diffusers scheduler for what the transformer predicts.
        vae: Decoder from latents to images; None for a model of pixels.
        class_names: One name per class.
        prediction_type: What the transformer predicts: `flow_prediction` or a `prediction_type` of
            diffusers' other schedulers; None takes that of `scheduler`.

    Raises:
        ValueError: If the scheduler does not fit the model.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: Transformer,
        scheduler: SchedulerMixin,
        vae: Autoencoder | None = None,
        class_names: Sequence[str] | None = None,
        prediction_type: str | None = None,
    ):
        super().__init__()
        prediction_type = prediction_type or prediction_of(scheduler)
        check_scheduler(scheduler, prediction_type, makes_variance(transformer))
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = None if class_names is None else list(class_names)
        self.register_to_config(class_names=names, prediction_type=prediction_type)
        self.vae_scale_factor = 1 if vae is None else compression(vae)[1]
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def num_classes(self) -> int:
        """Number of classes, not counting "no class"."""
        return self.transformer.config.num_embeds_ada_norm

    @property
    def class_names(self) -> list[str]:
        """One name per class; numbers where the model was saved without names."""
        settings: Any = self.config
        return list(settings.class_names or map(str, range(self.num_classes)))

    @property
    def prediction_type(self) -> str:
        """What the transformer predicts."""
        settings: Any = self.config
        return settings.prediction_type

    @property
    def size_multiple(self) -> int:
        """The sides of an image are multiples of this, in pixels."""
        return self.vae_scale_factor * self.transformer.config.patch_size

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Numbers of classes by name, as diffusers' `DiTPipeline` gives them.

        Raises:
            ValueError: If a name is unknown.
        """
        return list(class_numbers([label] if isinstance(label, str) else label, self.class_names))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Classes,
        num_inference_steps: int = 40,
        guidance_scale: float = 1.5,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        image_size: int | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image per label.

        Args:
            class_labels: Class numbers or names `[batch]`, or one of them.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance w: "no class" + w (class − "no class"). 1 is
                none, and halves the work.
            generator: One source of noise, or one per image.
            latents: Initial noise `[batch, channels, height, width]`, in place of `generator`'s.
            output_type: `pil`, `np` (`[batch, height, width, channels]` in [0, 1]), `pt`
                (`[batch, channels, height, width]` in [0, 1]) or `latent` (what the model made).
            return_dict: Wrap the result in diffusers' output class.
            callback_on_step_end: Called with pipeline, step, timestep and tensors after every step;
                may return changed tensors.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets.
            guidance_interval: Noise levels at which guidance is applied; see `Guidance`.
            guidance_channels: How many of the first channels are guided; None guides all.
            image_size: Side of the square images in pixels; None takes that of the training.

        Returns:
            The images.

        Raises:
            ValueError: If a label is no class of the model, an argument is out of its range, or a
                scheduler was put in that does not fit the model.
        """
        check_scheduler(self.scheduler, self.prediction_type, makes_variance(self.transformer))
        guidance = Guidance(guidance_scale, guidance_interval, guidance_channels)
        guidance.check_channels(self.transformer.config.in_channels)
        labels = label_tensor(class_labels, self.class_names, self.num_classes)
        self._check_call(len(labels), generator, output_type, callback_on_step_end_tensor_inputs)
        device = self._execution_device
        # Nothing in this function waits for the device, so that it always has work. The
        # scheduler's own numbers stay on the CPU.
        labels = send(labels, device)
        times, levels = self._set_timesteps(num_inference_steps, device)
        noise, source = noise_of(generator, len(labels), device)
        with noise:
            sample: Tensor = self._initial_noise(len(labels), image_size, source, latents, device)
        options: dict[str, Any] = {"return_dict": False}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            options["generator"] = source

        progress_bar: Any = self.progress_bar
        with progress_bar(total=num_inference_steps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                guide = guidance if guidance.applies(levels[i]) else None
                scaled = sample
                if hasattr(self.scheduler, "scale_model_input"):
                    scaled = self.scheduler.scale_model_input(sample, t)
                prediction = self._predict(scaled, times[i], labels, guide)
                with noise:
                    sample = self.scheduler.step(prediction, t, sample, **options)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, i, t, {"latents": sample})
                    sample = (changed or {}).get("latents", sample)
                bar.update()

        images: Any = sample if output_type == "latent" else self._decode(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_call(
        self, num_images: int, generator: Any, output_type: str, callback_tensors: Sequence[str]
    ) -> None:
        """Raise unless these arguments of `__call__` are ones that it takes."""
        if isinstance(generator, Sequence) and len(generator) != num_images:
            raise UserError(
                f"generator must be one or a list of one per image, found {len(generator)} for "
                f"{num_images} images"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type must be pil, np, pt or latent, found {output_type!r}")
        unknown = set(callback_tensors) - set(self._callback_tensor_inputs)
        if unknown:
            raise UserError(
                "callback_on_step_end_tensor_inputs must be among "
                f"{', '.join(self._callback_tensor_inputs)}, found {', '.join(sorted(unknown))}"
            )

    def _set_timesteps(
        self, num_inference_steps: int, device: torch.device
    ) -> tuple[Tensor, list[float]]:
        """Start the scheduler; its timesteps on the device, and their noise levels in [0, 1]."""
        self.scheduler.set_timesteps(num_inference_steps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        timesteps = self.scheduler.timesteps
        levels = timesteps.double() / self.scheduler.config.num_train_timesteps
        return send(timesteps, device), levels.tolist()

    def _initial_noise(
        self,
        num: int,
        image_size: int | None,
        generator: Any,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        config = self.transformer.config
        side = config.sample_size if image_size is None else self.latent_size(image_size)
        shape = (num, config.in_channels, side, side)
        if latents is None:
            latents = randn_tensor(shape, generator, device, torch.float32)
        elif latents.shape != shape:
            raise UserError(
                f"latents must be {list(shape)}, found {list(latents.shape)}; image_size asks for "
                "another size"
            )
        # Flow-matching schedulers start from plain noise and do not have this attribute.
        scale = getattr(self.scheduler, "init_noise_sigma", 1.0)
        return latents.to(device, torch.float32) * scale

    def latent_size(self, image_size: int) -> int:
        """Side of what the transformer gets, for images of this side.

        Raises:
            ValueError: If its patches do not tile that.
        """
        if image_size < 1 or image_size % self.size_multiple:
            raise UserError(
                f"image_size must be a multiple of {self.size_multiple}, found {image_size}"
            )
        return image_size // self.vae_scale_factor

    def _predict(
        self, latents: Tensor, t: Tensor, labels: Tensor, guidance: Guidance | None
    ) -> Tensor:
        """The prediction, guided unless `guidance` is None, float32.

        `[batch, channels, height, width]`; twice the channels for a scheduler that takes the
        learned variance.
        """
        num_channels = latents.shape[1]
        if guidance is not None:
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
            latents = torch.cat([latents, latents])
        dtype = self.transformer.proj_out_2.weight.dtype
        prediction = self.transformer(
            latents.to(dtype),
            timestep=t.expand(len(latents)),
            class_labels=labels,
            return_dict=False,
        )[0].float()
        if guidance is not None:
            with_class, without = prediction.chunk(2)
            prediction = guidance.combine(with_class, without, num_channels)
        return prediction if learns_variance(self.scheduler) else prediction[:, :num_channels]

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            mean, std = (
                send(torch.tensor(values).view(1, -1, 1, 1), latents.device)
                for values in latent_normalisation(self.vae)
            )
            latents = latents * std + mean
            latents = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(latents.float(), output_type=output_type)
