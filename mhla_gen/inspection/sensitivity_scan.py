"""One pass over the layers of a softmax model: how each, as MHLA, changes the output."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from mhla_gen.config import SensitivityConfig, save_config
from mhla_gen.config.fields import in_group
from mhla_gen.data import derived_seed, open_images
from mhla_gen.distillation.layers import LayerErrors, relative_error
from mhla_gen.distillation.teacher import mhla_attentions, softmax_twin, train_only, trained_names
from mhla_gen.errors import OccupiedError, UserError
from mhla_gen.files import append_line, write_lines, write_tensors
from mhla_gen.files.digests import tensors_digest
from mhla_gen.files.saved import DamagedFileError
from mhla_gen.inspection.grids import TokenGrid, token_grid
from mhla_gen.inspection.inputs import Input, joined, make_inputs
from mhla_gen.inspection.sensitivity_plan import plan_by_count
from mhla_gen.inspection.sensitivity_report import LayerSensitivity
from mhla_gen.inspection.subject import load_subject
from mhla_gen.models import inject
from mhla_gen.models.short import unmentioned
from mhla_gen.models.surgery import swap_processor
from mhla_gen.models.transformer import MHLATransformerMixin
from mhla_gen.outputs.folders import CONFIG_NAME
from mhla_gen.runtime.devices import resolve_device
from mhla_gen.training.log import read_log
from mhla_gen.training.optim import keep_mixing_in_range

LAYERS_NAME = "layers.jsonl"
_NUM_TIMESTEPS = 1000


@contextmanager
def only(student: Any, layers: Collection[str]) -> Iterator[None]:
    """Let these MHLA layers compute MHLA, and the others softmax with the same projections."""
    family, attentions = student.family, mhla_attentions(student)
    try:
        for name, attention in attentions.items():
            if name not in layers:
                swap_processor(attention, family.processors(attention)[2])
        yield
    finally:
        for attention in attentions.values():
            swap_processor(attention, family.processors(attention)[1])


@dataclass(frozen=True, eq=False)
class Scan:
    """A model with MHLA in every tried layer, and its inputs."""

    config: SensitivityConfig
    source: str
    student: Any
    digest: str
    """Of the softmax model's weights."""
    grid: TokenGrid
    inputs: Sequence[Input]
    draw: Any
    """Step → the inputs of one step of distillation."""

    @classmethod
    def prepare(cls, config: SensitivityConfig) -> "Scan":
        """Load and check everything.

        Raises:
            ValueError: If settings, model and data do not fit together.
            OSError: If the model or data are missing.
        """
        device = resolve_device(config.device)
        dtype = getattr(torch, config.dtype)
        subject = load_subject(str(config.model), config.component, dtype)
        if isinstance(subject.model, MHLATransformerMixin):
            raise UserError(f"{config.model} already has MHLA layers; give the softmax model")
        grid = token_grid(subject, config)
        images = None if config.data is None else open_images(config.data)
        inputs = make_inputs(subject, config, grid.axes, images)

        def draw(step: int) -> list[Input]:
            seed = derived_seed(config.seed, 1, step)
            generator = torch.Generator().manual_seed(seed)
            time = int(torch.randint(_NUM_TIMESTEPS, (), generator=generator))
            size = config.distill_batch_size
            fresh = replace(config, seed=seed, timesteps=(time,), num_inputs=size)
            return make_inputs(subject, fresh, grid.axes, images)

        digest = tensors_digest(subject.model.state_dict())
        with unmentioned(), in_group("mhla."):
            student = inject(subject.model, config.mhla)
        if config.softmax_layers is not None:
            plan_by_count(
                dict.fromkeys(range(len(mhla_attentions(student))), 0.0), config.softmax_layers
            )
        return cls(config, subject.source, student.to(device), digest, grid, inputs, draw)

    @property
    def layers(self) -> dict[int, str]:
        """Index in the model → name of the layers that are tried."""
        tried = mhla_attentions(self.student)
        names = [name for name, _ in self.student.family.attentions(self.student)]
        return {index: name for index, name in enumerate(names) if name in tried}

    def claim(self, folder: Path) -> None:
        """Claim the output folder, or resume it.

        Raises:
            FileExistsError: If it was measured on other weights, or at another size.
        """
        file = folder / LAYERS_NAME
        lines = read_log(file)
        if lines and lines[0].get("weights") != self.digest:
            raise OccupiedError(
                f"output_dir {folder} was measured on other weights of {self.config.model}; "
                "choose another one"
            )
        tokens = list(self.grid.axes)
        if lines and lines[0].get("tokens", tokens) != tokens:
            raise OccupiedError(
                f"output_dir {folder} was measured on {lines[0]['tokens']} tokens, but "
                f"{self.config.model} now has {tokens}, {self.grid.origin}; choose another one"
            )
        save_config(self.config, folder / CONFIG_NAME)
        # Without the half of a line that a killed scan may have left.
        lines = lines or [{"weights": self.digest, "tokens": tokens}]
        write_lines(file, lines)

    def distill(self, file: Path) -> None:
        """Let each layer learn its original for the steps asked for, or load what it learned."""
        if not self.config.distill_steps:
            return
        names = trained_names(self.student, "mhla")
        own = dict(self.student.named_parameters())
        if not file.is_file():
            with self._compared(names) as layers:
                self._fit(layers, [own[name] for name in sorted(names)])
            write_tensors(file, {name: own[name] for name in names})
        try:
            learned = load_file(file)
        except (SafetensorError, OSError) as error:
            remedy = "remove it to let the layers learn again"
            raise DamagedFileError(file, str(error), remedy) from error
        self.student.load_state_dict(learned, strict=False)

    def _fit(self, layers: LayerErrors, parameters: list[Tensor]) -> None:
        optimizer = torch.optim.Adam(parameters, lr=self.config.learning_rate)
        keep_mixing_in_range(optimizer, self.student)
        steps = tqdm(range(self.config.distill_steps), desc="distill layers", unit="step")
        for step in steps:
            batch = joined(self.draw(step))
            errors = layers.during(lambda batch=batch: batch.predicted(self.student))
            loss = torch.stack(list(errors.values())).mean(1)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            mean = float(loss.detach().mean())
            steps.set_postfix_str(f"relative error {mean:.4f}", refresh=False)

    @contextmanager
    def _compared(self, trained: Collection[str] = ()) -> Iterator[LayerErrors]:
        """The student with its layers compared to softmax, and in training mode themselves alone.

        The rest stays in evaluation mode: a DiT drops labels in training.
        """
        teacher = softmax_twin(self.student)
        train_only(self.student, trained)
        layers = LayerErrors(self.student, teacher)
        for attention in mhla_attentions(self.student).values():
            attention.train()
        try:
            yield layers
        finally:
            layers.remove()
            self.student.eval().requires_grad_(False)

    def measure(self, file: Path) -> list[LayerSensitivity]:
        """The errors of every layer, read from the file if already measured."""
        found = {line["layer"]: LayerSensitivity(**line) for line in read_log(file)[1:]}
        missing = {i: name for i, name in self.layers.items() if i not in found}
        for index, name in tqdm(missing.items(), desc="measure layers", unit="layer"):
            found[index] = LayerSensitivity(
                layer=index,
                name=name,
                output_error=self.error_of([index]),
                by_timestep=self._by_timestep([index]),
                layer_error=self._layer_errors[name],
            )
            append_line(file, json.dumps(found[index].to_dict()))
        return [found[index] for index in self.layers]

    def error_of(self, layers: Sequence[int]) -> float:
        """Relative error of the output with these layers replaced, the mean over inputs."""
        by_timestep = self._by_timestep(layers)
        return sum(by_timestep.values()) / len(by_timestep)

    @torch.no_grad()
    def _by_timestep(self, layers: Sequence[int]) -> dict[str, float]:
        """The error at each timestep, the mean over its inputs."""
        targets = self._softmax_outputs
        with only(self.student, [self.layers[index] for index in layers]):
            errors = [
                float(relative_error(item.predicted(self.student), target))
                for item, target in zip(self.inputs, targets, strict=True)
            ]
        # Inputs are in order of their timesteps.
        size = len(errors) // len(self.config.timesteps)
        return {
            str(time): sum(errors[i * size : (i + 1) * size]) / size
            for i, time in enumerate(self.config.timesteps)
        }

    @cached_property
    @torch.no_grad()
    def _softmax_outputs(self) -> list[Tensor]:
        with only(self.student, ()):
            return [item.predicted(self.student) for item in self.inputs]

    @cached_property
    @torch.no_grad()
    def _layer_errors(self) -> dict[str, float]:
        """Of each layer's own output, on the softmax model's activations."""
        with self._compared() as layers:
            found = [
                layers.during(lambda item=item: item.predicted(self.student))
                for item in self.inputs
            ]
        return {
            name: sum(float(errors[name]) for errors in found) / len(found) for name in layers.names
        }

    def facts(self) -> dict[str, Any]:
        """What was measured, for the report."""
        return {
            "model": self.source,
            "class": self.student.family.softmax_class(self.student).__name__,
            "weights": self.digest,
            "tokens": str(self.grid),
            "inputs": len(self.inputs),
            "of": "noise" if self.config.data is None else self.config.data.source,
            "distill_steps": self.config.distill_steps,
            "layout": list(self.student.mhla_config.layout),
        }
