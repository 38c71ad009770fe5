"""The doctor tries the real installation, and reports what breaks instead of breaking."""

import importlib.metadata
import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhla_gen import doctor
from mhla_gen.cli import main

QUICK = [
    *(
        "packages",
        "optional",
        "operator",
        "alignment",
        "GPU",
        "kernels",
        "softmax",
        "graphs",
        "conversion",
    ),
    *("video", "inception", "caches"),
]


def test_nothing_is_broken_here():
    findings = doctor.examine(QUICK)
    assert [finding.name for finding in findings] == QUICK
    assert {finding.state for finding in findings} <= {"ok", "absent"}, doctor.report(findings)


def test_a_check_that_raises_is_a_finding_with_its_remedy(monkeypatch, capsys):
    def fail():
        raise RuntimeError("no encoder\nlong story")

    monkeypatch.setitem(doctor.CHECKS, "video", fail)
    assert main(["doctor", "checks=[video]"]) == 2
    captured = capsys.readouterr()
    assert "broken" in captured.out and "RuntimeError: no encoder" in captured.out
    assert doctor.REMEDIES["video"] in captured.out and "long story" not in captured.out
    assert captured.err == "mhla-gen doctor: error: not working: video; the table says what to do\n"


def test_a_cache_that_cannot_be_written_is_named_with_its_setting(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "file" / "hub"))
    (finding,) = doctor.examine(["caches"])
    assert finding.state == "broken" and str(tmp_path / "file") in finding.detail
    assert "set TORCH_HOME to another folder" in finding.remedy
    monkeypatch.undo()
    (finding,) = doctor.examine(["caches"])
    assert finding.state == "ok" and re.search(r"GB of features in \d+ sets", finding.detail)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda name: ["torch>=99", "no-such-package"]
    )
    (finding,) = doctor.examine(["packages"])
    assert finding.state == "broken"
    assert "needs >=99" in finding.detail and "no-such-package is missing" in finding.detail


def test_an_optional_package_is_named_with_its_setting_and_how_to_install_it(monkeypatch):
    missing = ["datasets"]

    def version(name):
        if name in missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("importlib.metadata.version", version)
    (finding,) = doctor.examine(["optional"])
    assert finding.state == "absent" and "peft 1.0" in finding.detail
    assert finding.detail.endswith("; without datasets (data.source=huggingface)")
    assert finding.remedy.endswith("-m pip install 'mhla_gen[datasets]'")
    missing.clear()
    assert doctor.examine(["optional"])[0].state == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the check takes the GPU's")
def test_the_softmax_that_torch_takes_can_run():
    (finding,) = doctor.examine(["softmax"])
    taken = re.search(r"torch takes (\w+) for", finding.detail)[1]
    query = torch.randn(2, 16, 256, 64)
    with sdpa_kernel([getattr(SDPBackend, taken.upper())]):
        F.scaled_dot_product_attention(query, query, query)


def test_every_remedy_belongs_to_a_check():
    assert doctor.REMEDIES.keys() <= doctor.CHECKS.keys()


def test_unknown_checks_are_refused():
    with pytest.raises(ValueError, match="found moon"):
        doctor.examine(["moon"])


def test_products_that_depend_on_alignment_are_told(monkeypatch):
    (finding,) = doctor.examine(["alignment"])
    # tests/conftest.py sets it.
    assert finding.state == "ok" and "MKL_CBWR" in finding.detail
    linear = F.linear

    def by_address(row, weight):
        return linear(row, weight) * (1 + 1e-6 * (weight.data_ptr() % 64 == 4))

    monkeypatch.setattr(F, "linear", by_address)
    (finding,) = doctor.examine(["alignment"])
    assert finding.state == "absent" and "MKL_CBWR=AUTO,STRICT" in finding.remedy
