"""The sample command: a folder of samples, made by any number of processes and runs."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState

from mhla_gen.config import SampleConfig, save_config
from mhla_gen.errors import OccupiedError, UserError, not_worth_failing
from mhla_gen.outputs.folders import CONFIG_NAME, check_writable, differing_values, made_with
from mhla_gen.outputs.locks import claimed
from mhla_gen.runtime.devices import device_name, repeatable_convolutions, resolve_device
from mhla_gen.runtime.processes import join_processes, on_main
from mhla_gen.sampling import card, estimate
from mhla_gen.sampling.batched_sampler import BatchedSampler, largest_batch
from mhla_gen.sampling.building import build_sampler, place
from mhla_gen.sampling.finished import finish, require_whole_set
from mhla_gen.sampling.keeping import Keeper
from mhla_gen.sampling.manifest import (
    MANIFEST_NAME,
    digest_of,
    identity,
    read_manifest,
    weights_of,
)
from mhla_gen.sampling.own_settings import FREE, free_of
from mhla_gen.sampling.progress import Progress
from mhla_gen.sampling.prompt_sampler import PromptSampler
from mhla_gen.sampling.samplers import ClassSampler, Sampler
from mhla_gen.sampling.streaming import keep_clips
from mhla_gen.sampling.units import Units, Work

if TYPE_CHECKING:
    from mhla_gen.sampling.scoring import Scorer


def sample(config: SampleConfig, dry_run: bool = False) -> Path:
    """Sample as a config says and write the sample set.

    All processes of a launch call this. An interrupted set is resumed.

    Args:
        config: Settings.
        dry_run: Load and check everything, time two steps of a few samples, say what would be made,
            and write nothing.

    Returns:
        The folder of the sample set.

    Raises:
        ValueError: If settings and pipeline do not fit together.
        OSError: If the pipeline is missing, or the output folder holds something else or cannot be
            written.
    """
    resolve_device(config.device)
    state = join_processes(config.device)
    folder = Path(config.output_dir)
    on_main(lambda: made_with(folder, config, free_of(config)))
    on_main(lambda: check_writable(folder))
    with nullcontext() if dry_run else claimed(folder):
        return _sample(config, folder, state, dry_run)


def _sample(config: SampleConfig, folder: Path, state: PartialState, dry_run: bool) -> Path:
    if config.card:
        on_main(lambda: card.check(config.pipeline))
    config, sampler = build_sampler(config)
    # Again: with all settings, and another command may have had the folder in between.
    on_main(lambda: made_with(folder, config, FREE))
    job = Job(config, folder, sampler, state)
    if (folder / MANIFEST_NAME).is_file():
        on_main(lambda: require_whole_set(folder))
        if state.is_main_process:
            print(f"{folder} already holds these {job.summary}; nothing to do")
            job.work.remove()
    elif dry_run:
        job.rehearse()
    else:
        job.run()
    if config.card and not dry_run and state.is_main_process:
        with not_worth_failing("the model card", "the samples are complete"):
            card.write(config.pipeline, folder)
    return folder


class Job:
    """A sample set to be made."""

    def __init__(self, config: SampleConfig, folder: Path, sampler: Sampler, state: PartialState):
        self.config, self.folder, self.sampler, self.state = config, folder, sampler, state
        # Of several GPUs a process has its own.
        wanted = resolve_device(config.device)
        self.device = torch.device(state.device or "cuda") if wanted.type == "cuda" else wanted
        most = config.model_batch_size or sampler.model_batch_size
        self.units = Units.split(len(sampler), most)
        self.work = Work(folder, self.units)
        self.formats = _formats(config, sampler)
        self.kept_formats = self.formats if config.keep_samples else ()
        self.on_sheet = {number for _, numbers in sampler.rows() for number in numbers}
        self.identity = on_main(self._identity)

    @property
    def summary(self) -> str:
        """The set in words."""
        count, kind = len(self.sampler), "video" if self.sampler.is_video else "image"
        what = f"{count} {kind}{'s' if count > 1 else ''}"
        if isinstance(self.sampler, ClassSampler):
            classes = len(np.unique(self.sampler.labels))
            return f"{what} of {classes} class{'es' if classes > 1 else ''}"
        return f"{what} from prompts"

    @property
    def described(self) -> str:
        """The set with its settings, in words."""
        config, shape = self.config, " × ".join(map(str, self.sampler.shape))
        guidance = "" if config.guidance_scale is None else f", guidance {config.guidance_scale:g}"
        rate = f", {config.fps:g} frames per second" if self.sampler.is_video else ""
        size, count = estimate.size(self.sampler, self.kept_formats), self.state.num_processes
        return (
            f"{self.summary} to {self.folder}, {config.num_inference_steps} steps each: {shape}"
            f"{rate}{guidance}, {config.dtype}, {size}, by "
            f"{count} process{'es' if count > 1 else ''} on {self.device.type}"
        )

    def rehearse(self) -> None:
        """Print what would be sampled, how large it is, and how long it would take."""
        place(self.config, self.sampler.pipeline, self.device)
        scorer = self._scorer()
        processes = self.state.num_processes
        time = estimate.timed(self.sampler, self.units, self.config, processes)
        if self.state.is_main_process:
            print(
                f"would write {self.described}; {time}{estimate.memory()}"
                + (", evaluated on the way" if scorer else "")
            )

    def run(self) -> None:
        """Sample what is missing, and finish the set."""
        config, processes = self.config, self.state.num_processes
        scorer = self._scorer()
        place(config, self.sampler.pipeline, self.device)
        on_main(self._begin)
        on_main(self.work.forget_damaged)
        missing = on_main(lambda: sorted(set(range(len(self.units))) - self.work.done()))
        time = estimate.remaining(self.sampler, self.units, len(missing), config, processes)
        if self.state.is_main_process:
            print(f"writing {self.described}{time}", flush=True)
        self._draw(missing[self.state.process_index :: self.state.num_processes], scorer)
        self.state.wait_for_everyone()
        if scorer is not None:
            scorer.score(self.units, digest_of(self.work.marks()))
        on_main(
            lambda: finish(
                self.folder, self.sampler, config, self.kept_formats, self.work, self.identity
            )
        )
        if self.state.is_main_process:
            print(f"wrote {self.summary} to {self.folder}")

    def _identity(self) -> dict[str, Any]:
        """What determines the samples; refuses a folder with samples of something else."""
        weights = weights_of(self.sampler.pipeline)
        exact = self.config.reproducible
        found = identity(self.sampler, self.units, weights, self.device, exact)
        before = self.work.identity() or read_manifest(self.folder).get("identity")
        changes = [] if before is None else differing_values(before, found)
        if changes:
            raise OccupiedError(
                f"output_dir {self.folder} was made with another model, other samples or another "
                f"kind of device ({'; '.join(changes)}); choose another output_dir or move it away"
            )
        return found

    def _scorer(self) -> "Scorer | None":
        if self.config.evaluate is None:
            return None
        features, shape = self.work.features_folder, self.sampler.shape
        # Sampling alone needs none of the packages that evaluation brings.
        from mhla_gen.sampling.scoring import Scorer

        labels = self.sampler.labels if isinstance(self.sampler, ClassSampler) else None
        return Scorer(self.config.evaluate, self.folder, features, shape, len(self.sampler), labels)

    def _begin(self) -> None:
        save_config(replace(self.config, output_dir=str(self.folder)), self.folder / CONFIG_NAME)
        self.work.write_identity(self.identity)

    def _draw(self, missing: Sequence[int], scorer: "Scorer | None") -> None:
        """Make units, chunk by chunk where only the files of such clips are kept."""
        show = self.state.is_main_process
        with Progress(len(self.sampler), self.work.count_done, "sampling", show) as progress:
            in_chunks = isinstance(self.sampler, PromptSampler) and self.sampler.num_chunks
            if in_chunks and self.kept_formats == ("mp4",) and scorer is None:
                self._draw_chunks(missing, progress)
            else:
                self._draw_batches(missing, scorer, progress)

    def _draw_chunks(self, missing: Sequence[int], progress: Progress) -> None:
        config, sampler = self.config, self.sampler
        assert isinstance(sampler, PromptSampler)
        assert config.fps is not None and config.num_inference_steps is not None
        with repeatable_convolutions() if config.reproducible else nullcontext():
            for unit in missing:
                keep_clips(
                    self.folder,
                    self.work,
                    unit,
                    sampler,
                    steps=config.num_inference_steps,
                    fps=config.fps,
                    on_sheet=self.on_sheet,
                    on_step=progress.step,
                )
                progress.step(0)

    def _draw_batches(
        self, missing: Sequence[int], scorer: "Scorer | None", progress: Progress
    ) -> None:
        config, sampler, measure = self.config, self.sampler, scorer and scorer.measure
        assert config.fps is not None and config.num_inference_steps is not None
        size = self._batch_size(sum(len(self.units.numbers(unit)) for unit in missing))
        steps, exact = config.num_inference_steps, config.reproducible
        with (
            Keeper(
                self.folder, self.work, self.kept_formats, self.on_sheet, config.fps, measure
            ) as keeper,
            BatchedSampler(sampler, self.units, steps, size, exact) as batched,
        ):
            for unit, samples in batched.draw(missing, progress.step):
                values = {"device": device_name(), "notes": list(batched.notes)}
                keeper.keep(unit, samples, values)
                progress.step(0)

    def _batch_size(self, limit: int) -> int:
        if self.config.batch_size != "auto":
            return self.config.batch_size
        if self.config.reproducible or not limit:
            return self.units.rows
        return largest_batch(self.sampler, limit, self.device.type == "cuda")


def _formats(config: SampleConfig, sampler: Sampler) -> tuple[str, ...]:
    if config.formats == "auto":
        if isinstance(sampler, ClassSampler):
            return ("npz",)
        return ("mp4",) if sampler.is_video else ("png",)
    wrong, kind = ("png", "videos") if sampler.is_video else ("mp4", "images")
    if wrong in config.formats:
        raise UserError(f"formats has {wrong}, but the samples are {kind}; leave {wrong} out")
    return config.formats
