"""Keeps other packages from printing into the progress bar of a run."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers.utils.logging
import transformers.utils.logging


@contextmanager
def undisturbed() -> Iterator[None]:
    """No bars of saving and loading inside, and not the warning that autocast brings about.

    Under autocast Wan's norms get tokens in bfloat16 and keep weights in float32, which is meant:
    torch then runs them in two kernels in place of one, and warns once.
    """
    packages = [diffusers.utils.logging, transformers.utils.logging]
    shown = [package for package in packages if package.is_progress_bar_enabled()]
    for package in shown:
        package.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            yield
    finally:
        for package in shown:
            package.enable_progress_bar()
