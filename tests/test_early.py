"""Cheap mistakes are found before torch is loaded, which takes seconds."""

import json
import subprocess
import sys

import pytest
from tiny import tiny_video

# Command, settings with {0} for a folder, and what is said.
MISTAKES = [
    ("sample", "pipeline={0}/nowhere", "there is no such folder"),
    ("sample", "pipeline={0}/wan", "the WanPipeline in {0}/wan takes prompts; set prompts=TEXT"),
    ("sample", "pipeline={0}/wan adapter={0}/nowhere prompts=a", "there is no such folder"),
    ("sample", "pipeline={0}/wan prompts={0}/no.txt", "no.txt does not exist"),
    ("sample", "pipeline={0}/wan prompts={0}/images.jsonl", "no.png of prompt 0 does not exist"),
    (
        "sample",
        "pipeline={0}/wan prompt_embeds={0}/no.st",
        "prompt_embeds {0}/no.st does not exist",
    ),
    ("sample", "pipeline={0}/wan output_dir={0}/taken", "but files that this command did not"),
    ("train", "output_dir={0}/taken", "exists and is not a training run"),
    ("train", "output_dir={0}/run max_steps=7", "contains a run; add resume=latest"),
    ("train", "output_dir={0}/run max_steps=7 seed=3 resume=latest", "seed: found 0, asked for 3"),
    ("train", "data.source=cache data.path={0}/no", "data.path {0}/no does not exist"),
    (
        "train",
        "data.source=digits evaluate_every=5 evaluation.reference={0}/no.npz",
        "evaluation.reference {0}/no.npz does not exist",
    ),
    ("cache", "data.source=clips data.path={0}/clips vae.path=x", "1 of 1 clips have no caption"),
    ("evaluate", "samples={0}/no.npz reference={0}/wan", "samples {0}/no.npz does not exist"),
    ("reference", "data={0}/no", "data {0}/no does not exist"),
]
CODE = """
import json, sys
from contextlib import redirect_stderr
from io import StringIO
from mhla_gen.cli import main
for command, settings in json.loads(sys.argv[1]):
    with redirect_stderr(StringIO()) as said:
        status = main([command, *settings.split()])
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
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("job: train\nmax_steps: 7\n")
    (tmp_path / "clips").mkdir()
    tiny_video(tmp_path / "clips" / "dog.mp4", frames=2)
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
