# ruff: noqa: E501 - bytes are read more easily in long lines.
"""Readers of what users write: whatever the bytes, nothing but our own errors comes out.

By hand, more of them: `python tests/test_fuzz_lists.py 100000 [SEED]`.
"""

import io
import random
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mhla_gen.config import SampleConfig, TrainConfig, load_config
from mhla_gen.data.arrays import load_npz
from mhla_gen.data.stores import listed_images
from mhla_gen.data.webdataset import tar_shards
from mhla_gen.errors import UserError
from mhla_gen.evaluation.npz import npz_keys, open_array
from mhla_gen.evaluation.statistics_file import StatisticsFile
from mhla_gen.sampling.prompts import read_prompts

# Pieces that mean something to one of the readers, so that changes come deeper than noise does.
# fmt: off
PIECES = [
    *(
        b",",
        b'"',
        b'""',
        b"\n",
        b"\r\n",
        b"\r",
        b"\t",
        b";",
        b"\0",
        b"\\",
        b"'",
        b"#",
        b"- ",
        b": ",
    ),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b"[[[[",
        b"{{",
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!python/name:os.system ",
    ),
    *(b"!x ", b"%YAML 9.9\n", b"---\n", b"...", b"? ", b"| ", b"> ", b"@", b"`", b"${x}", b"???"),
    *(b"null", b"true", b"nan", b"NaN", b"Infinity", b"-inf", b".inf", b"1e400", b"-1", b"1.5"),
    *(b"0", b"1_000", b"0x10", b"9" * 30, b"9" * 5000, b"1e20", b"off", b"12:30:00", b"~", b"~x/y"),
    *(
        b'"path"',
        b'"label"',
        b'"prompt"',
        b'"seed"',
        b"path",
        b"label",
        b"caption",
        b"job: train\n",
    ),
    *(
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"caf\xe9",
        b"\x85",
    ),
    *(b"https://x.org/a", b"../", b"/", b"a" * 300, b"\x00" * 512, b"ustar", b"././@LongLink"),
    *(b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY", b"descr", b"|O", b"shape", b"<u8", b"(1, -1)"),
]
# fmt: on


def png():
    return b"\x89PNG\r\n\x1a\n" + bytes(40)


def tar_bytes(generator):
    file = io.BytesIO()
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=file, mode="w", format=generator.choice(formats)) as archive:
        for i in range(3):
            long = "./" + "d" * generator.choice((0, 0, 90)) + "/"
            for suffix, content in (("png", png()), ("json", b'{"label": 1, "caption": "a"}')):
                entry = tarfile.TarInfo(f"{long}{i}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        entry = tarfile.TarInfo(f"{long}9.json")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo(f"{long}9.png")
        link.type, link.linkname = (
            generator.choice((tarfile.LNKTYPE, tarfile.SYMTYPE)),
            f"{long}2.png",
        )
        archive.addfile(link)
    return file.getvalue()


def npz_bytes(generator):
    file = io.BytesIO()
    images = np.zeros((3, 4, 4, 3), np.uint8)
    arrays = {"arr_0": images, "labels": np.arange(3), "mu": np.zeros(2), "sigma": np.eye(2)}
    save = generator.choice((np.savez, np.savez_compressed))
    save(file, **arrays, count=np.asarray(3))
    return file.getvalue()


CSV = b'path,label,caption\n0.png,1,"a, b"\n1.png,2.0,plain\n\n2.png,3,""\n'
JSONL = b'{"path": "0.png", "label": 1, "caption": "a"}\n{"path": "1.png", "label": 2.0, "caption": ""}\n'
PROMPTS = (
    b'{"prompt": "a cat", "seed": 3, "image": "x.png"}\n{"prompt": "", "negative_prompt": "b"}\n'
)
YAML = b"""job: train
output_dir: runs/x
data: {source: folder, path: d, image_size: 16}
model:
  mhla: {layout: [2, 2], layers: 2/3}
  preset: DiT-S/2
evaluation:
  metrics: [fid, kid]
learning_rate: 1e-3
max_steps: 10
"""
OVERRIDES = (
    *(b"prompts=[a, b]", b"classes=[1, cat]", b"scheduler_options={a: 1}", b"fps=16", b"image=~/x"),
    *(b"evaluate.metrics=[fid]", b"guidance_interval=[0.1, 0.9]", b"evaluate={size: 3}", b"seed=1"),
)


def read_tar(path):
    store = tar_shards(str(path), "label", "caption", None)
    for index in range(len(store)):
        store.content(index)


def read_statistics(path):
    for key in sorted(npz_keys(path)):
        np.asarray(open_array(path, key)).tobytes()
    file = StatisticsFile(path)
    file.protocol()
    file.statistics("pool")


def read_override(path):
    text = path.read_bytes().decode(errors="surrogateescape")
    load_config(None, text.split("\x1f"), SampleConfig)


def read_config(path):
    load_config(path, ["max_steps=3"] if path.stat().st_size % 2 else [])
    load_config(path, [], TrainConfig)


READERS = {
    "csv": (lambda g: CSV, "a.csv", lambda p: listed_images(p, "label", "caption", None)),
    "jsonl": (lambda g: JSONL, "a.jsonl", lambda p: listed_images(p, "label", "caption", 5)),
    "prompts": (lambda g: PROMPTS, "p.jsonl", lambda p: read_prompts(str(p))),
    "text": (lambda g: b"a cat\na dog\n", "p.txt", lambda p: read_prompts(str(p))),
    "tar": (tar_bytes, "a.tar", read_tar),
    "npz": (npz_bytes, "a.npz", load_npz),
    "statistics": (npz_bytes, "s.npz", read_statistics),
    "config": (lambda g: YAML, "c.yaml", read_config),
    "override": (lambda g: g.choice(OVERRIDES), "o.txt", read_override),
}


def mutated(content, generator):
    """Random bytes, a cut, or some changes of a valid file."""
    if generator.random() < 0.03:
        return generator.randbytes(generator.randrange(400))
    content = bytearray(content)
    for _ in range(generator.choice((0, 1, 1, 2, 4, 12))):
        at = generator.randrange(len(content) + 1)
        kind = generator.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            content[at:at] = generator.choice(PIECES)
        elif kind == 2:
            piece = generator.choice(PIECES)
            content[at : at + len(piece)] = piece
        elif kind == 3:
            del content[at : at + generator.randrange(1, 60)]
        elif kind == 4:
            start = generator.randrange(len(content) + 1)
            content[at:at] = content[start : start + generator.randrange(1, 80)]
        elif at:
            del content[at:]
    return bytes(content)


def try_many(count, seed, folder, names=tuple(READERS)):
    """Read `count` inputs; how many were read and refused, by reader."""
    generator = random.Random(seed)
    found = Counter()
    for number in range(count):
        name = names[number % len(names)]
        make, file, read = READERS[name]
        path = folder / file
        content = mutated(make(generator), generator)
        path.write_bytes(content)
        try:
            read(path)
            found[name, "read"] += 1
        except UserError as error:
            said = str(error)
            assert said and "\n" not in said, (name, number, seed, said)
            found[name, "refused"] += 1
        except Exception as error:
            kept = Path(tempfile.gettempdir()) / f"fuzz-{name}-{seed}-{number}-{file}"
            kept.write_bytes(content)
            raise AssertionError(f"{kept}: {type(error).__name__}: {error}") from error
    return found


@pytest.mark.parametrize("name", READERS)
def test_nothing_but_our_own_errors_comes_out(name, tmp_path):
    found = try_many(120, seed=0, folder=tmp_path, names=(name,))
    # Both happen: the inputs are neither all valid nor all noise.
    assert found[name, "read"] > 5 and found[name, "refused"] > 5, found


if __name__ == "__main__":
    began, start = time.time(), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory() as place:
        total = try_many(int(sys.argv[1]), start, Path(place))
    for key, value in sorted(total.items()):
        print(*key, value)
    print(f"{sum(total.values())} inputs in {time.time() - began:.0f} s")
