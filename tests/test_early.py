"""Cheap mistakes are found before torch is loaded, which takes seconds."""

import json
import subprocess
import sys

import pytest
from tiny import tiny_video

# Command, settings with {0} for a folder, and what is said.
MISTAKES = [
    ("sample", "pipeline={0}/nowhere", "there is no such folder"),
    # Said once, though two checks look at the place.
    ("sample", "pipeline={0}/images.jsonl", "with no folder called owner here)\n"),
    (
        "sample",
        "pipeline=a/b prompts=a output_dir={0}/images.jsonl",
        "is a file; choose another output_dir or move it away\n",
    ),
    ("sample", "pipeline={0}/wan", "the WanPipeline in {0}/wan takes prompts; set prompts=TEXT"),
    ("sample", "pipeline={0}/wan adapter={0}/nowhere prompts=a", "there is no such folder"),
    ("sample", "pipeline={0}/wan adapter={0}/wan prompts=a", "has no mhla_adapter.safetensors"),
    ("sample", "pipeline={0}/wan prompts={0}/clips", "names a folder that prompts are not read"),
    (
        "sample",
        "pipeline={0}/wan prompts=a output_dir={0}/job",
        "for `mhla-gen train`, not for",
    ),
    ("sample", "pipeline={0}/wan prompts={0}/no.txt", "no.txt does not exist"),
    ("sample", "pipeline={0}/wan prompts={0}/images.jsonl", "no.png of prompt 0 does not exist"),
    (
        "sample",
        "pipeline={0}/wan prompt_embeds={0}/no.st",
        "prompt_embeds {0}/no.st does not exist",
    ),
    ("sample", "pipeline={0}/wan output_dir={0}/taken", "but files that this command did not"),
    ("train", "output_dir={0}/taken", "exists and is not a training run"),
    (
        "train",
        "output_dir={0}/taken data.source=npz data.path={0}/no.npz model.pretrained={0}/no",
        "choose another one; also: data.path {0}/no.npz does not exist; also: model.pretrained={0}",
    ),
    ("train", "distill.teacher={0}/no output_dir={0}/new", "distill.teacher={0}/no: there is no"),
    (
        "train",
        "distill.teacher=NOPE data.source=npz data.path={0}/no",
        "also: distill.teacher=NOPE",
    ),
    ("train", "data.source=clips data.path={0}/clips", "must be cached first"),
    ("train", "output_dir={0}/run max_steps=7", "contains a run; add resume=latest"),
    ("train", "output_dir={0}/run max_steps=7 seed=3 resume=latest", "seed: found 0, asked for 3"),
    ("train", "data.source=cache data.path={0}/no", "data.path {0}/no does not exist"),
    (
        "train",
        "data.source=digits evaluate_every=5 evaluation.reference={0} evaluation.features.extractor"
        "=torchscript evaluation.metrics=[fd]",
        "evaluation.features.extractor=torchscript needs evaluation.features.weights=FILE",
    ),
    (
        "train",
        "data.source=digits evaluate_every=5 evaluation.reference={0}/no.npz",
        "evaluation.reference {0}/no.npz does not exist",
    ),
    ("cache", "data.source=clips data.path={0}/clips vae.path=x", "1 of 1 clips have no caption"),
    ("cache", "data.source=folder data.path={0}/clips data.image_size=8", "a cache needs vae.path"),
    ("cache", "vae.path=NOPE output_dir={0}/new", "vae.path=NOPE: there is no such folder"),
    (
        "cache",
        "vae.path={0}/clips text.path=NOPE",
        "a training run that has finished; also: te",
    ),
    ("cache", "output_dir={0}/run vae.path=a/b", "was written by another command"),
    ("cache", "output_dir={0}/no verify=true", "output_dir {0}/no does not exist"),
    ("evaluate", "samples={0}/no.npz reference={0}/wan", "samples {0}/no.npz does not exist"),
    ("evaluate", "", "samples=PATH is required"),
    ("evaluate", "samples= reference={0}", "samples is empty; write . for the current folder"),
    ("train", "output_dir=", "output_dir is empty; write ."),
    ("train", "output_dir={0}/loop", "loop is a link to something that does not exist"),
    (
        "evaluate",
        "samples={0} reference={0} features.cache_dir={0}/images.jsonl",
        "features.cache_dir {0}/images.jsonl cannot be made: {0}/images.jsonl is a file",
    ),
    ("evaluate", "samples={0} reference={0} out={0}", "out {0} is a folder; name a file"),
    ("evaluate", "samples={0} reference={0} metrics=[fvd]", "fvd cannot be measured with"),
    (
        "evaluate",
        "samples={0} reference={0} features.weights={0}/no",
        "features.weights {0}/no",
    ),
    ("reference", "data={0}/no", "data {0}/no does not exist"),
    ("reference", "data={0} out=mean.txt", "out must be an npz file, found mean.txt"),
    (
        "sample",
        "pipeline=a/b evaluate.reference={0}/no",
        "evaluate.reference {0}/no does not",
    ),
    (
        "sample",
        "pipeline=a/b evaluate.metrics=[kid]",
        "reference=PATH is required for every",
    ),
    ("inspect", "output_dir={0}/new", "inspect needs a model"),
    (
        "inspect",
        "{0}/clips teacher=NOPE",
        "run with a pipeline or a checkpoint; also",
    ),
    ("inspect", "model={0}/wan output_dir={0}/taken", "but files that this command did not"),
    (
        "inspect sensitivity",
        "{0}/no data.source=npz data.path={0}/no",
        "also: data.path {0}/no",
    ),
    ("convert", "", "set source to"),
    ("convert", "source={0}/no.pt output_dir={0}/taken", "also: source {0}/no.pt does not exist"),
    ("bench", "output_dir={0}/measured", "contains an earlier measurement"),
    ("quickstart", "output_dir={0}/taken", "but files that this command did not"),
]
CODE = """
import json, sys
from contextlib import redirect_stderr
from io import StringIO
from mhla_gen.cli import main
for command, settings in json.loads(sys.argv[1]):
    with redirect_stderr(StringIO()) as said:
        status = main([*command.split(), *settings.split()])
    print(json.dumps([status, said.getvalue()]))
loaded = {"torch", "diffusers", "transformers", "accelerate"} & set(sys.modules)
print(json.dumps(sorted(loaded)))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (tmp_path / "images.jsonl").write_text('{"prompt": "a", "image": "no.png"}\n')
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("job: train\nmax_steps: 7\n")
    (tmp_path / "clips").mkdir()
    tiny_video(tmp_path / "clips" / "dog.mp4", frames=2)
    (tmp_path / "job").mkdir()
    # The settings of two commands may have the same name and other values.
    (tmp_path / "job" / "config.yaml").write_text("job: train\ncompile: none\n")
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "bench.json").write_text("{}")
    return tmp_path


def test_mistakes_that_need_no_torch_do_not_load_it(folder):
    given = [(command, settings.format(folder)) for command, settings, _ in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(given)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *found, loaded = map(json.loads, done.stdout.splitlines())
    for (command, settings, message), (status, said) in zip(MISTAKES, found, strict=True):
        assert status == 2 and said.count("\n") == 1, (settings, said)
        assert said.startswith(f"mhla-gen {command}: error: "), said
        assert message.format(folder) in said, (settings, said)
    assert loaded == []
