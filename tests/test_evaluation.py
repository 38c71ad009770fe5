"""The two commands on a tiny TorchScript network: protocols, cache, resuming, processes."""

import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from ranks import torchrun

from mhla_gen.cli import main
from mhla_gen.config import EvaluateConfig, FeaturesConfig, ReferenceConfig
from mhla_gen.errors import NotWritableError
from mhla_gen.evaluation import (
    FeatureStatistics,
    build_reference,
    evaluate,
    features,
    load_images,
)
from mhla_gen.evaluation.errors import EvaluationError, ProtocolMismatchError
from mhla_gen.evaluation.extractor import ExtractorIdentity
from mhla_gen.evaluation.extractors import Dinov2Extractor, build_extractor
from mhla_gen.evaluation.feature_cache import cached_sets, limit_cache
from mhla_gen.evaluation.protocol import EvaluationProtocol
from mhla_gen.evaluation.statistics_file import write_statistics


class Pooled(torch.nn.Module):
    """Mean and standard deviation of colours over a 2 × 2 grid: 24 features."""

    def forward(self, images):
        cells = images.float().unfold(2, images.shape[2] // 2, images.shape[2] // 2)
        cells = cells.unfold(3, images.shape[3] // 2, images.shape[3] // 2).flatten(4)
        return torch.cat([cells.mean(-1).flatten(1), cells.std(-1).flatten(1)], dim=1)


class PooledClips(torch.nn.Module):
    def forward(self, clips):
        return torch.cat([clips.mean((3, 4)).flatten(1), clips.std((3, 4)).flatten(1)], dim=1)


class NotANumber(torch.nn.Module):
    def forward(self, images):
        return images.float().mean((2, 3)) / 0


def scripted(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(path))
    return str(path)


@pytest.fixture
def network(tmp_path):
    return scripted(Pooled(), tmp_path / "pooled.pt")


def pictures(count, seed, size=16):
    rng = np.random.default_rng(seed)
    tint = rng.integers(0, 128, (count, 1, 1, 3))
    return (rng.integers(0, 128, (count, size, size, 3)) + tint).astype(np.uint8)


@pytest.fixture
def settings(tmp_path, network):
    np.savez(tmp_path / "samples.npz", arr_0=pictures(60, 1))
    np.savez(tmp_path / "real.npz", arr_0=pictures(80, 2))
    return EvaluateConfig(
        samples=str(tmp_path / "samples.npz"),
        reference=str(tmp_path / "real.npz"),
        metrics=("fd", "kid", "precision", "recall"),
        features=FeaturesConfig(
            extractor="torchscript", trust=True, weights=network, cache_dir=str(tmp_path / "cache")
        ),
        kid_subset_size=20,
        out=str(tmp_path / "out" / "metrics.json"),
    )


def values(results):
    return {result.metric: result.value for result in results}


def test_every_number_has_a_protocol_and_every_distance_an_interval(settings, capsys, tmp_path):
    results = evaluate(settings)
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(written["metrics"]) == ["fd", "kid", "precision", "recall"]
    for result in results:
        entry = written["metrics"][result.metric]
        assert entry["value"] == result.value
        assert entry["protocol"] == result.protocol
        assert f"{result.metric}-60".lower() in result.protocol.lower()
        assert "own-resize fp32 16x16" in result.protocol and "vs-80" in result.protocol
        assert result.protocol in printed
    for metric in ("fd", "kid"):
        low, high = written["metrics"][metric]["interval_95"]
        assert low < written["metrics"][metric]["value"] < high
    assert written["samples"]["count"] == 60
    assert len(written["samples"]["sha256"]) == 64


def test_reference_against_itself_is_zero(settings):
    same = replace(settings, samples=settings.reference, metrics=("fd", "precision", "recall"))
    found = values(evaluate(same))
    assert abs(found["fd"]) < 1e-6
    assert (found["precision"], found["recall"]) == (1, 1)


def test_folder_npz_sample_set_and_list_give_the_same_numbers(settings, tmp_path):
    expected = values(evaluate(settings))
    images = pictures(60, 1)
    for index, image in enumerate(images):
        path = tmp_path / "folder" / f"{index // 10}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    for name, part in (("first", images[:25]), ("second", images[25:])):
        (tmp_path / name).mkdir()
        np.savez_compressed(tmp_path / name / "samples.npz", arr_0=part, labels=np.zeros(len(part)))
        (tmp_path / name / "manifest.json").write_text(json.dumps({"sampler": name}))
    parts = [str(tmp_path / "first"), str(tmp_path / "second")]
    for samples in (str(tmp_path / "folder"), parts):
        assert values(evaluate(replace(settings, samples=samples))) == expected
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["samples"]["manifests"] == [{"sampler": "first"}, {"sampler": "second"}]


def test_batch_size_and_workers_change_nothing(settings):
    expected = values(evaluate(settings))
    for index, (batch_size, workers) in enumerate(((7, 0), (60, 2))):
        other = replace(
            settings.features,
            batch_size=batch_size,
            num_workers=workers,
            cache_dir=f"{settings.features.cache_dir}-{index}",
        )
        found = values(evaluate(replace(settings, features=other)))
        assert found == pytest.approx(expected, rel=1e-6)


def built(settings, tmp_path, **changes):
    options = {
        "data": settings.reference,
        "out": str(tmp_path / "ref.npz"),
        "features": settings.features,
        **changes,
    }
    return str(build_reference(ReferenceConfig(**options)))


def test_a_built_reference_gives_the_numbers_of_its_images(settings, tmp_path):
    reference = built(settings, tmp_path)
    with np.load(reference) as file:
        assert {"mu", "sigma", "arr_0", "count", "protocol"} <= set(file)
        np.testing.assert_array_equal(file["arr_0"], pictures(80, 2))
    assert values(evaluate(replace(settings, reference=reference))) == pytest.approx(
        values(evaluate(settings)), rel=1e-9
    )


def test_references_crop_to_the_size_and_keep_a_choice_of_images(settings, tmp_path):
    reference = built(settings, tmp_path, size=8, keep_images=10)
    with np.load(reference) as file:
        assert file["arr_0"].shape == (10, 8, 8, 3)
    with pytest.raises(ProtocolMismatchError, match=r"samples 16 × 16, reference 8 × 8.*size=N"):
        evaluate(replace(settings, reference=reference))
    found = evaluate(replace(settings, reference=reference, size=8, metrics=("fd",)))
    assert "8x8 adm-crop-8" in found[0].protocol


def test_mismatched_protocols_are_refused_with_the_remedy(settings, tmp_path):
    reference = built(settings, tmp_path)

    other = scripted(OtherPooled(), tmp_path / "other.pt")
    features_of_other = replace(settings.features, weights=other)
    with pytest.raises(
        ProtocolMismatchError, match=r"extractor: samples torchscript-other.*rebuild"
    ):
        evaluate(replace(settings, reference=reference, features=features_of_other))


class OtherPooled(torch.nn.Module):
    def forward(self, images):
        return images.float().mean((2, 3))


def test_adm_files_take_official_inception_only(settings, tmp_path):
    statistics = FeatureStatistics.from_features(torch.randn(50, 24))
    path = tmp_path / "adm.npz"
    np.savez(path, mu=statistics.mean, sigma=statistics.covariance)
    with pytest.raises(ProtocolMismatchError, match="reference inception-2015-12-05"):
        evaluate(replace(settings, reference=str(path), metrics=("fd",)))


def identity(**changes):
    return ExtractorIdentity(
        **{"name": "n", "weights": "w" * 64, "resize": "r", "dtype": "fp32", **changes}
    )


@pytest.mark.parametrize(
    "other, word",
    [
        (EvaluationProtocol(identity(weights="v" * 64), (8, 8)), "weights"),
        (EvaluationProtocol(identity(resize="other"), (8, 8)), "resize"),
        (EvaluationProtocol(identity(dtype="fp64"), (8, 8)), "dtype"),
        (EvaluationProtocol(identity(), (8, 9)), "image size"),
        (EvaluationProtocol(identity(), (8, 8), frames="frames-0:16:1"), "frames"),
    ],
)
def test_each_part_of_a_protocol_counts(other, word):
    protocol = EvaluationProtocol(identity(), (8, 8), "adm-crop-8")
    protocol.require_same(EvaluationProtocol(identity(), (8, 8)))
    protocol.require_same(EvaluationProtocol(identity(), None))
    with pytest.raises(
        ProtocolMismatchError, match=rf"{word}: samples .*; (use|rebuild|set|bring)"
    ):
        protocol.require_same(other)
    assert EvaluationProtocol.from_json(other.to_json()) == other


def test_malformed_statistics_say_what_is_wrong(settings, tmp_path):
    path = tmp_path / "bad.npz"
    good = FeatureStatistics.from_features(torch.randn(50, 24))
    reference = built(settings, tmp_path)
    protocol = str(np.load(reference)["protocol"])
    for arrays, message in (
        ({"sigma": good.covariance}, "has no mu, which fid needs"),
        (
            {"mu": good.mean, "sigma": np.eye(7)},
            r"covariance \[dim, dim\], found \[24\] and \[7, 7\]",
        ),
        ({"mu": good.mean * np.nan, "sigma": good.covariance}, "NaN"),
        ({"mu": np.zeros(7), "sigma": np.eye(7)}, "same dimensions, found 24 and 7"),
    ):
        np.savez(path, protocol=np.asarray(protocol), **arrays)
        with pytest.raises(EvaluationError, match=message):
            evaluate(replace(settings, reference=str(path), metrics=("fd",)))
    np.savez(path, protocol=np.asarray(protocol), mu=good.mean, sigma=good.covariance)
    with pytest.raises(
        EvaluationError, match="has no arr_0: precision, recall and KID need images"
    ):
        evaluate(replace(settings, reference=str(path)))


def test_nan_features_are_refused(settings, tmp_path):
    network = scripted(NotANumber(), tmp_path / "nan.pt")
    broken = replace(settings, features=replace(settings.features, weights=network))
    with pytest.raises(EvaluationError, match="of 80 features are NaN or infinite"):
        evaluate(replace(broken, metrics=("fd",)))


def folder_of(path, images):
    for index, image in enumerate(images):
        path.mkdir(exist_ok=True)
        Image.fromarray(image).save(path / f"{index:03d}.png")
    return path


def test_corrupt_images_are_listed_and_stop_the_run_unless_skipped(settings, tmp_path):
    folder = folder_of(tmp_path / "folder", pictures(60, 1))
    for name in ("004.png", "033.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:50])
    damaged = replace(settings, samples=str(folder), metrics=("fd",))
    with pytest.raises(
        EvaluationError, match=r"(?s)2 of 60 .*skip_corrupt=true.*004\.png.*033\.png"
    ):
        evaluate(damaged)
    result = evaluate(replace(damaged, skip_corrupt=True))[0]
    assert result.protocol.startswith("FD-58 ")
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [line.split()[0] for line in written["samples"]["unreadable"]] == ["004.png", "033.png"]
    kept = np.delete(pictures(60, 1), [4, 33], axis=0)
    np.savez(tmp_path / "kept.npz", arr_0=kept)
    clean = replace(settings, samples=str(tmp_path / "kept.npz"), metrics=("fd",))
    assert result.value == pytest.approx(evaluate(clean)[0].value, rel=1e-9)


def test_mixed_sizes_and_single_images_are_refused(settings, tmp_path):
    folder = folder_of(tmp_path / "mixed", [*pictures(30, 1), *pictures(1, 2, size=20)])
    with pytest.raises(EvaluationError, match=r"first is 16 × 16, 030\.png is 20 × 20; size=N"):
        evaluate(replace(settings, samples=str(folder), metrics=("fd",)))
    one = folder_of(tmp_path / "one", pictures(1, 1))
    with pytest.raises(EvaluationError, match="hold 1 of the 20 images"):
        evaluate(replace(settings, samples=str(one), metrics=("fd",)))
    with pytest.raises(EvaluationError, match="at least 2 samples, found 1"):
        evaluate(replace(settings, reference=str(one), metrics=("fd",)))


def test_interrupted_extraction_resumes(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 16)
    cache = tmp_path / "cache"
    evaluate(settings)
    chunks = sorted(cache.rglob("pool-0*.npz"))
    assert len(chunks) == 4 + 5
    first = {path: path.stat().st_mtime_ns for path in chunks}
    expected = json.loads((tmp_path / "out" / "metrics.json").read_text())
    # What an interruption leaves: some chunks, no statistics.
    chunks[1].unlink()
    for path in cache.rglob("pool-statistics.npz"):
        path.unlink()
    evaluate(settings)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == expected
    changed = [path for path in chunks if path.stat().st_mtime_ns != first[path]]
    assert changed == [chunks[1]]


def test_the_cache_of_features_keeps_to_its_limit(settings, tmp_path):
    """What nobody has asked for longest goes; what is read now, or was today, stays."""
    evaluate(settings)
    cache = Path(settings.features.cache_dir)
    (cache / "notes").mkdir()
    sets = cached_sets(cache)
    assert len(sets) == 2 and all(each.size > 1000 for each in sets)
    smallest = replace(settings, features=replace(settings.features, cache_limit_gb=0.0))
    evaluate(smallest)
    assert len(cached_sets(cache)) == 2
    old = cache / ("0" * 32)
    shutil.copytree(sets[0].folder, old)
    os.utime(old / "settings.json", (0, 0))
    limit_cache(cache, sum(each.size for each in cached_sets(cache)) / 1e9)
    assert old.is_dir()
    evaluate(smallest)
    assert {path.name for path in cache.iterdir()} == {"notes", *(s.folder.name for s in sets)}


def test_changed_images_under_the_same_name_are_measured_again(settings, tmp_path):
    before = values(evaluate(settings))
    np.savez(tmp_path / "samples.npz", arr_0=pictures(60, 9))
    assert values(evaluate(settings))["fd"] != before["fd"]


def test_two_processes_give_the_numbers_of_one(settings, tmp_path):
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (2200, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    np.savez(tmp_path / "real.npz", arr_0=images[::-1] // 2)
    expected = values(evaluate(replace(settings, kid_subsets=3)))
    shared = [
        "features.extractor=torchscript",
        "features.trust=true",
        f"features.weights={settings.features.weights}",
        f"features.cache_dir={tmp_path}/other",
        "features.device=cpu",
    ]
    command = "-m", "mhla_gen.cli"
    built = f"data={tmp_path}/real.npz", f"out={tmp_path}/ref.npz"
    torchrun(2, *command, "reference", *built, *shared)
    torchrun(
        2,
        *command,
        "evaluate",
        f"samples={tmp_path}/samples.npz",
        f"reference={tmp_path}/ref.npz",
        "metrics=[fd,kid,precision,recall]",
        "kid_subset_size=20",
        "kid_subsets=3",
        f"out={tmp_path}/two.json",
        *shared,
    )
    written = json.loads((tmp_path / "two.json").read_text())["metrics"]
    for metric, value in expected.items():
        assert written[metric]["value"] == pytest.approx(value, rel=1e-6)


def test_only_what_is_decoded_is_read_by_processes(settings, tmp_path):
    images = pictures(3, 0)
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(images):
        imageio.imwrite(tmp_path / "folder" / f"{number}.png", image)
    array, folder = settings.samples[0], tmp_path / "folder"
    assert not load_images(array).decodes
    assert load_images(array, size=8).decodes
    assert load_images(folder).decodes and load_images([array, folder]).decodes
    assert not load_images([array, array]).decodes


@pytest.mark.gpu
def test_the_last_batch_has_as_many_rows_as_the_others_on_a_gpu(settings, tmp_path):
    """And its features are those of its images."""
    found = {}
    for device in ("cpu", "cuda"):
        options = {"device": device, "cache_dir": str(tmp_path / device), "batch_size": 32}
        found[device] = values(
            evaluate(replace(settings, features=replace(settings.features, **options)))
        )
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-4)


def test_dry_run_measures_nothing(settings, tmp_path, capsys):
    assert evaluate(settings, dry_run=True) == []
    assert "would measure 60 images" in capsys.readouterr().out
    assert not list(tmp_path.rglob("pool-*.npz"))
    plan = ReferenceConfig(data=settings.samples, features=settings.features)
    assert build_reference(plan, dry_run=True) is None


PIXELS = ["features.extractor=pixels", "metrics=[fd]"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "samples=PATH is required"),
        (["samples=."], "reference=PATH is required"),
        (["samples=.", "reference=.", "metrics=[fvd]"], "fvd cannot be measured with"),
        (["samples=.", "reference=.", "metrics=[fd]"], "fd is the same distance on any other"),
        (["samples=.", "reference=.", "metrics=[fad]"], "metrics must be one of"),
        (["samples=.", "reference=.", "metrics=[fvd]"], "give features.extractor=i3d, for"),
        (["samples=.", "reference=.", "metrics=[fd]"], "give features.extractor=dinov2, for"),
        (
            ["samples=.", "reference=.", "features.extractor=pixels"],
            "give metrics=[fd,precision,recall,kid], for",
        ),
        (["samples=.", "reference=.", "features.extractor=i3d", "metrics=[fvd]"], "TorchScript"),
        (["samples=.", "reference=.", "features.dtype=float64", *PIXELS], "is for inception"),
        (["sample=x"], "did you mean samples?"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message, capsys):
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_nothing_that_is_not_theirs_is_written_over(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("made", "real"):
        images = rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    (tmp_path / "half.json").write_text('{"metrics": {')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    same = [f"features.cache_dir={tmp_path}/cache", "features.extractor=pixels"]
    both = [f"samples={tmp_path}/made.npz", f"reference={tmp_path}/real.npz", "metrics=[fd]"]
    for out in ("made.npz", "notes.json", "half.json"):
        assert main(["evaluate", *both, *same, f"out={tmp_path}/{out}"]) == 2
        assert f"{out} was not written by this command" in capsys.readouterr().err
    for out in ("real.npz", "adm.npz"):
        assert main(["reference", f"data={tmp_path}/real.npz", *same, f"out={tmp_path}/{out}"]) == 2
        assert f"{out} was not written by this command" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    # Their own are replaced.
    for _ in range(2):
        assert main(["evaluate", *both, *same, f"out={tmp_path}/new.json"]) == 0
        assert main(["reference", both[1].replace("reference", "data"), *same,
                     f"out={tmp_path}/new.npz"]) == 0  # fmt: skip


def test_videos_are_known_before_a_network_is_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "0.mp4").write_bytes(b"")
    np.savez(tmp_path / "clips.npz", arr_0=np.zeros((4, 3, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((40, 8, 8, 3), np.uint8))
    here = f"features.cache_dir={tmp_path}/cache", f"out={tmp_path}/out.npz"
    for videos in ("films", "clips.npz"):
        for samples, reference in ((videos, videos), ("images.npz", videos)):
            both = f"samples={tmp_path}/{samples}", f"reference={tmp_path}/{reference}"
            assert main(["evaluate", *both, "metrics=[fid]", *here]) == 2
            assert "are measured by features.extractor=i3d" in capsys.readouterr().err
        assert main(["reference", f"data={tmp_path}/{videos}", *here]) == 2
        assert "are measured by features.extractor=i3d" in capsys.readouterr().err
    assert not (tmp_path / "no weights").exists()


def fvd_of(folder, samples, reference, **features):
    weights = scripted(PooledClips(), folder / "i3d.pt")
    features |= {"cache_dir": str(folder / "cache"), "weights": weights, "trust": True}
    return EvaluateConfig(
        samples=str(folder / samples),
        reference=str(folder / reference),
        metrics=("fvd",),
        features=FeaturesConfig(extractor="i3d", **features),
        out=str(folder / "metrics.json"),
    )


def test_fvd_measures_clips(tmp_path):
    rng = np.random.default_rng(0)
    for name, high in (("samples", 200), ("real", 256)):
        clips = rng.integers(0, high, (40, 6, 12, 12, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=clips)
    shape = {"video_frames": 3, "video_stride": 2, "batch_size": 16}
    result = evaluate(fvd_of(tmp_path, "samples.npz", "real.npz", **shape))[0]
    assert result.value > 0
    assert result.protocol.startswith("FVD-40 i3d-i3d-")
    assert "bilinear-224 fp32 12x12 frames-0:5:2 vs-40" in result.protocol


def test_labels_stay_with_clips_where_others_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "CHUNK", 4)
    rng = np.random.default_rng(0)
    for name, count, length in (("short", 7, 4), ("long", 20, 6), ("more", 3, 5), ("real", 30, 6)):
        labels = np.arange(count) % 3
        clips = rng.integers(0, 60, (count, length, 12, 12, 3))
        clips += 90 * labels[:, None, None, None, None]
        np.savez(tmp_path / f"{name}.npz", arr_0=clips.astype(np.uint8), labels=labels)
    config = fvd_of(tmp_path, "long.npz", "real.npz", video_frames=6)
    config = replace(config, metrics=("accuracy",), skip_corrupt=True)
    parts = tuple(str(tmp_path / f"{name}.npz") for name in ("short", "long", "more"))
    (alone,), (found,) = evaluate(config), evaluate(replace(config, samples=parts))
    assert alone.value == found.value == 1 and found.protocol.startswith("accuracy-20 ")
    (judged,) = evaluate(replace(config, samples=str(tmp_path / "real.npz"), reference=parts))
    assert judged.value == 1 and "vs-20" in judged.protocol
    # Features that an earlier version wrote, without the numbers of what it left out.
    for path in (tmp_path / "cache").glob("*/pool-*.npz"):
        with np.load(path) as archive:
            arrays = dict(archive)
        lines = list(json.loads(arrays["unreadable"].tobytes()).values())
        arrays["unreadable"] = np.frombuffer(json.dumps(lines).encode(), np.uint8)
        np.savez(path, **arrays)
    capsys.readouterr()
    assert evaluate(replace(config, samples=parts))[0].value == 1
    # Chunks 0, 1, 6 and 7 of four clips each.
    assert capsys.readouterr().err.count("without numbers): computed again") == 4


def test_a_reference_keeps_the_labels_of_its_images(settings, tmp_path):
    labels = np.arange(60) % 3
    images = np.minimum(pictures(60, 1) // 4 + 90 * labels[:, None, None, None], 255)
    np.savez(tmp_path / "samples.npz", arr_0=images.astype(np.uint8), labels=labels)
    reference = built(settings, tmp_path, data=settings.samples, keep_images=40)
    with np.load(reference) as file:
        kept = dict(file)
    assert len(kept["labels"]) == 40
    assert (kept["arr_0"].mean((1, 2, 3)) // 90 == kept["labels"]).all()
    same = replace(settings, reference=str(reference), metrics=("accuracy",))
    assert values(evaluate(same)) == {"accuracy": 1.0}


def saved_at(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_class_folders_are_labels(settings, tmp_path):
    """In the order of their names, which is neither that of the tints nor of the files."""
    tints = {"10": 0, "b": 90, "a": 180}
    for number, image in enumerate(pictures(60, 1)):
        name = list(tints)[number % 3]
        saved_at(tmp_path / "real" / name / f"{number}.png", image // 4 + np.uint8(tints[name]))
    reference = built(settings, tmp_path, data=str(tmp_path / "real"), keep_images=40)
    with np.load(reference) as file:
        kept = dict(file)
    assert len(kept["labels"]) == 40
    order = np.array([tints[name] // 90 for name in ("10", "a", "b")])
    assert (kept["arr_0"].mean((1, 2, 3)) // 90 == order[kept["labels"]]).all()
    same = replace(settings, reference=str(reference), metrics=("accuracy",))
    assert values(evaluate(replace(same, samples=str(tmp_path / "real")))) == {"accuracy": 1.0}


def test_class_folders_of_other_classes_are_not_compared(settings, tmp_path):
    for side, names in (("real", "abc"), ("some", "bc"), ("one", ["images"])):
        for number, image in enumerate(pictures(60, 1)):
            saved_at(tmp_path / side / names[number % len(names)] / f"{number}.png", image)
    reference = built(settings, tmp_path, data=str(tmp_path / "real"), keep_images=40)
    for real in (str(reference), str(tmp_path / "real")):
        asked = replace(settings, reference=real, metrics=("accuracy",))
        for side in ("some", "one"):
            with pytest.raises(EvaluationError, match="one number would mean two classes"):
                evaluate(replace(asked, samples=str(tmp_path / side)))


@pytest.mark.parametrize(
    ("places", "labels"),
    [
        (["0/a", "2/a", "10/a", "1/a"], None),
        (["0/a", "2/a", "2/b", "1/a"], [0, 1, 2, 2]),
        (["cat/a", "dog/a", "dog/deeper/b"], None),
        (["cat/a", "dog/a", "b"], None),
        (["a", "b"], None),
    ],
)
def test_folders_of_unknown_classes_are_no_labels(places, labels, tmp_path):
    for place in places:
        saved_at(tmp_path / "images" / f"{place}.png", pictures(1, 0)[0])
    found = load_images(tmp_path / "images").labels()
    assert (None if found is None else found.tolist()) == labels


def test_labels_of_several_folders_are_of_the_same_classes(tmp_path):
    for place in ("one/cat", "one/dog", "two/cat", "two/dog", "three/ape", "three/cat"):
        saved_at(tmp_path / place / "0.png", pictures(1, 0)[0])
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert load_images([one, two]).labels().tolist() == [0, 1, 0, 1]
    assert load_images([one, three]).labels() is None


def test_a_video_that_takes_too_long_is_left_out(tmp_path):
    for index in range(2):
        path = tmp_path / "films" / f"{index}.mp4"
        path.parent.mkdir(exist_ok=True)
        imageio.imwrite(path, np.full((4, 64, 64, 3), 99, np.uint8), fps=8, macro_block_size=1)
    config = fvd_of(tmp_path, "films", "films", video_frames=4, video_timeout=0.001)
    late = r"takes longer than 0\.001 s; features\.video_timeout allows more"
    with pytest.raises(EvaluationError, match=f"none of 2 can be read.*{late}"):
        evaluate(config)


def test_fvd_reads_folders_of_videos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("samples", "real"):
        for index in range(5):
            path = tmp_path / name / f"{index}.mp4"
            path.parent.mkdir(exist_ok=True)
            frames = rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
            imageio.imwrite(path, frames, fps=8, macro_block_size=1)
    config = replace(fvd_of(tmp_path, "samples", "real", video_frames=6), jackknife_groups=2)
    assert "64x64 frames-0:6:1 vs-5" in evaluate(config)[0].protocol
    too_long = replace(config, features=replace(config.features, video_frames=7))
    with pytest.raises(EvaluationError, match=r"none of 5 can be read.*has 6 frames"):
        evaluate(too_long)


def test_dinov2_from_a_local_folder(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    tiny = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    Dinov2Model(tiny).save_pretrained(tmp_path / "dinov2")
    extractor = build_extractor(
        FeaturesConfig(extractor="dinov2", weights=str(tmp_path / "dinov2"))
    )
    images = torch.from_numpy(pictures(3, 0, 32)).permute(0, 3, 1, 2)
    found = extractor(images)["pool"]
    assert found.shape == (3, 16) and found.dtype == torch.float32
    torch.testing.assert_close(extractor(images[:1])["pool"], found[:1], rtol=1e-5, atol=1e-5)
    with pytest.raises(EvaluationError, match="no local folder and could not be fetched"):
        Dinov2Extractor(tmp_path / "nowhere")


def test_efficientnet_lite0_tells_pictures_apart():
    pytest.importorskip("efficientnet_lite_pytorch")
    extractor = build_extractor(FeaturesConfig(extractor="efficientnet-lite0"))
    images = torch.from_numpy(pictures(2, 0, 32)).permute(0, 3, 1, 2)
    found = extractor(images)["pool"]
    assert found.shape == (2, 1280)
    assert not torch.allclose(found[0], found[1])


def test_scripts_with_another_output_are_refused(tmp_path):
    class Maps(torch.nn.Module):
        def forward(self, images):
            return images.float()

    with pytest.raises(EvaluationError, match=r"must return features \[batch, dim\]"):
        build_extractor(
            FeaturesConfig(
                extractor="torchscript", trust=True, weights=scripted(Maps(), tmp_path / "maps.pt")
            )
        )
    (tmp_path / "not.pt").write_text("no network")
    with pytest.raises(EvaluationError, match="no TorchScript file"):
        build_extractor(
            FeaturesConfig(extractor="torchscript", trust=True, weights=str(tmp_path / "not.pt"))
        )


def test_statistics_files_keep_all_digits(tmp_path):
    statistics = FeatureStatistics.from_features(torch.randn(50, 5))
    protocol = EvaluationProtocol(identity(), (8, 8))
    write_statistics(tmp_path / "a.npz", {"pool": statistics}, protocol, {})
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_array_equal(file["sigma"], statistics.covariance)
        assert int(file["count"]) == 50


@pytest.mark.parametrize("damage", ["halved", "emptied", "changed", "missing"])
def test_features_that_were_damaged_are_computed_again(damage, settings, tmp_path, monkeypatch):
    """Bytes that changed in the cache changed a distance, and half a file ended an evaluation."""
    monkeypatch.setattr(features, "CHUNK", 16)
    expected = values(evaluate(settings))
    cached = [p for p in (tmp_path / "cache").rglob("*.npz")]
    assert len(cached) == 4 + 5 + 1
    for path in cached:
        content = path.read_bytes()
        middle = len(content) // 2
        changed = content[:middle] + bytes(x ^ 1 for x in content[middle : middle + 9])
        made = {"halved": content[:middle], "emptied": b"", "missing": b""}
        path.write_bytes(made.get(damage, changed + content[middle + 9 :]))
        if damage == "missing":
            path.unlink()
        assert values(evaluate(settings)) == expected
        assert path.read_bytes() == content


def test_a_program_wants_trust(settings):
    features = replace(settings.features, trust=False)
    with pytest.raises(ValueError, match=r"is TorchScript, a program .*features\.trust=true"):
        evaluate(replace(settings, features=features))


def test_equal_sets_have_a_distance_of_zero(settings, capsys):
    assert values(evaluate(replace(settings, samples=settings.reference, metrics=("fd",)))) == {
        "fd": 0.0
    }
    assert " 0.0000 " in capsys.readouterr().out


def test_a_place_that_takes_no_files_is_named_before_anything_is_measured(settings, tmp_path):
    with pytest.raises(NotWritableError, match="out /proc/x cannot be made: /proc is"):
        evaluate(replace(settings, out="/proc/x/metrics.json"))
    with pytest.raises(NotWritableError, match="out /proc/x cannot be made"):
        build_reference(ReferenceConfig(data=settings.samples, out="/proc/x/stats.npz"))
    assert not (tmp_path / "cache").exists()
