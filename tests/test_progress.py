"""The progress bar of a sample set."""

import pytest

from mhla_gen.sampling import progress


@pytest.fixture
def shown(monkeypatch):
    """A bar of a set of which `done` samples are done, and what it shows after a step."""
    monkeypatch.setattr(progress, "_SECONDS", 0)

    def show(done, *in_work, total=20):
        bar = progress.Progress(total, lambda: done, "sampling", show=True)
        for each in in_work:
            bar.step(each)
        return bar._bar.n

    return show


def test_a_clip_in_work_is_a_fraction(shown):
    assert shown(0, 1 / 3, total=1) == 0.33
    assert shown(2, 0.5) == 2.5


def test_of_many_samples_only_whole_ones_are_shown(shown):
    assert shown(12, 0.5) == 12
    assert isinstance(shown(3, 0.999), int)


def test_the_bar_neither_goes_back_nor_beyond_its_end(shown):
    assert shown(0, 5.5, 1.0) == 5.5
    assert shown(19, 4.0) == 20
