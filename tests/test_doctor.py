"""The doctor tries the real installation, and reports what breaks instead of breaking."""

import pytest

from mhla_gen import doctor
from mhla_gen.cli import main

QUICK = ["packages", "operator", "GPU", "conversion", "video", "inception", "caches"]


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
    assert captured.err == "mhla-gen doctor: error: video does not work; the table names remedies\n"


def test_a_cache_that_cannot_be_written_is_named_with_its_setting(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "file" / "hub"))
    (finding,) = doctor.examine(["caches"])
    assert finding.state == "broken" and str(tmp_path / "file") in finding.detail
    assert "set TORCH_HOME to another folder" in finding.remedy
    monkeypatch.undo()
    assert doctor.examine(["caches"])[0].state == "ok"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda name: ["torch>=99", "no-such-package"]
    )
    (finding,) = doctor.examine(["packages"])
    assert finding.state == "broken"
    assert "needs >=99" in finding.detail and "no-such-package is missing" in finding.detail


def test_unknown_checks_are_refused():
    with pytest.raises(ValueError, match="found moon"):
        doctor.examine(["moon"])
