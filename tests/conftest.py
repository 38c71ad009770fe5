"""Shared rules of the test run: a fixed seed, and what to do without a GPU."""

import gc
import importlib.util
import os
import sys

# Without it MKL's products of one row depend, on some processors, on where a weight lies in memory:
# a loaded model then differs from the saved one by rounding. MKL reads it when torch is loaded.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# Processes that share the tests share the cores, too; torch reads this when it is loaded.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
# No test needs a network: names that are not on this machine are answered at once, not after some
# attempts to reach the hub. huggingface_hub reads this when it is loaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Until all tests are collected: importing makes millions of objects that stay, and walking them
# again and again is half of the work.
gc.disable()

# Triton reads this when a kernel is defined: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        importlib.import_module("interpreter").hasten()
        importlib.import_module("bounds").watch()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps one state per process, precision included."""
    yield
    # Tests of the operator do not load it.
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    try:
        return (yield)
    finally:
        # Nor are they walked during the tests.
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or os.environ.get("REQUIRE_GPU") == "1":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
