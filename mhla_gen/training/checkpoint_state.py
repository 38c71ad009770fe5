"""The state of a run on disk, as safetensors and JSON, which execute nothing when read.

Tensors that processes share (FSDP2) are written by each process with the rows that it holds, and
read by any number of processes.
"""

import itertools
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from mhla_gen.files import errors_naming, flush, write_json
from mhla_gen.files.digests import file_digest
from mhla_gen.files.saved import read_json
from mhla_gen.training.saved_tensors import Rows, SavedTensors, len_of, write_rows
from mhla_gen.training.shards import as_shared
from mhla_gen.training.training_run import Run

STATE_NAME = "state.json"
KINDS = ("model", "average", "optimizer")
"""Files of tensors: `KIND.safetensors`, or `KIND-RANK-of-COUNT.safetensors` of each process."""
_RECENT_NAME = "recent.safetensors"

Facts = dict[str, dict[str, Any]]
"""Bytes and SHA-256 of files, by name."""


def write_state(run: Run, folder: Path) -> Facts:
    """Write this process's part of a run; every process must call it.

    Args:
        run: Between two steps.
        folder: Of the checkpoint.

    Returns:
        The files of this process; they are on the disk.

    Raises:
        WriteError: If there is no room.
    """
    recent, main = run.recent.state(), run.accelerator.is_main_process
    everyone = gather_object([_random_state()])
    names = []
    for kind in KINDS:
        rows = {name: entry for name, entry in _rows(run, kind).items() if entry.mine}
        if rows:
            names.append(_name(run, kind))
            with errors_naming(folder / names[-1], folder):
                write_rows(folder / names[-1], rows)
    if main:
        names.append(STATE_NAME)
        write_json(
            folder / STATE_NAME,
            {
                "optimizer": _optimizer_groups(run),
                "optimizer_values": _optimizer_values(run),
                "learning_rate": run.learning_rate.state_dict(),
                "average": run.ema.settings(),
                "random": everyone,
            },
            indent=None,
        )
        if recent:
            names.append(_RECENT_NAME)
            with errors_naming(folder / _RECENT_NAME, folder):
                save_file(recent, folder / _RECENT_NAME)
    return facts_of(folder, names)


def facts_of(folder: Path, names: Iterable[str]) -> Facts:
    """Bytes and digest of files, once they are on the disk."""

    def one(name: str) -> dict[str, Any]:
        path = folder / name
        with errors_naming(path, folder):
            flush(path)
        return {"bytes": path.stat().st_size, "sha256": file_digest(path)}

    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def damage_of(folder: Path, facts: Facts) -> str | None:
    """Which file is damaged, and how; None if all are intact.

    Args:
        folder: Of the checkpoint.
        facts: Of its files.
    """
    for name, fact in facts.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != fact["bytes"]:
            return f"{path} is damaged ({path.stat().st_size} bytes of {fact['bytes']})"
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: file_digest(folder / name), facts)
        for (name, fact), digest in zip(facts.items(), digests, strict=True):
            if fact["sha256"] != digest:
                return f"{folder / name} is damaged (its bytes have changed)"
    return None


def read_state(run: Run, folder: Path) -> None:
    """Restore a run, each process its part.

    Args:
        run: Just built.
        folder: A whole checkpoint of the same model.
    """
    state = read_json(folder / STATE_NAME, "use another checkpoint")
    with torch.no_grad():
        for kind in ("model", "average"):
            saved = SavedTensors(folder, kind)
            for name, rows in _rows(run, kind).items():
                rows.local.copy_(saved.rows(name, rows.start, len_of(rows.local)))
    run.ema.load_settings(state["average"])
    run.learning_rate.load_state_dict(state["learning_rate"])
    values = state.get("optimizer_values", {})
    _read_optimizer(run, SavedTensors(folder, "optimizer"), state["optimizer"], values)
    recent = folder / _RECENT_NAME
    run.recent.load(SavedTensors(folder, "recent").all() if recent.is_file() else {})
    everyone = state["random"]
    if run.accelerator.process_index < len(everyone):
        _set_random_state(everyone[run.accelerator.process_index])


def _name(run: Run, kind: str) -> str:
    if not run.accelerator.is_fsdp2:
        return f"{kind}.safetensors"
    rank, count = run.accelerator.process_index, run.accelerator.num_processes
    return f"{kind}-{rank:05d}-of-{count:05d}.safetensors"


def _rows(run: Run, kind: str) -> dict[str, Rows]:
    """What this process holds of the tensors of a kind, by name."""
    model, main = run.accelerator.unwrap_model(run.model), run.accelerator.is_main_process
    parameters = dict(model.named_parameters())
    if kind == "model":
        return {n: Rows.of(t, main=main) for n, t in model.state_dict().items()}
    if kind == "average":
        pairs = zip(parameters.items(), run.ema.shadow_params, strict=True)
        return {n: Rows.of(average, like=p, main=main) for (n, p), average in pairs}
    state = _optimizer_state(run)
    return {n: Rows.of(v, main=main) for n, v in state.items() if isinstance(v, Tensor)}


def _optimizer_state(run: Run) -> dict[str, Any]:
    """The optimizer's state of each parameter, as `KEY.PARAMETER`."""
    model = run.accelerator.unwrap_model(run.model)
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in run.optimizer.state.get(parameter, {}).items()
    }


def _optimizer_values(run: Run) -> dict[str, Any]:
    """What of it is no tensor, such as the steps that bitsandbytes counts."""
    return {n: value for n, value in _optimizer_state(run).items() if not isinstance(value, Tensor)}


def _names_of_groups(run: Run) -> list[list[str]]:
    """Names of the parameters of each group of the optimizer."""
    model = run.accelerator.unwrap_model(run.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in run.optimizer.param_groups]


def _optimizer_groups(run: Run) -> list[dict[str, Any]]:
    groups = zip(run.optimizer.param_groups, _names_of_groups(run), strict=True)
    return [{**group, "params": names} for group, names in groups]


def _read_optimizer(
    run: Run, saved: SavedTensors, groups: list[dict[str, Any]], values_by_name: dict[str, Any]
) -> None:
    kinds = sorted({name.split(".", 1)[0] for name in (*saved.shapes, *values_by_name)})
    state: dict[int, dict[str, Any]] = {}
    numbers = itertools.count()
    plain = []
    for group, names, known in zip(
        run.optimizer.param_groups, _names_of_groups(run), groups, strict=True
    ):
        indices = list(itertools.islice(numbers, len(names)))
        # JSON has no tuples.
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
        plain.append({**values, "params": indices})
        for index, name, parameter in zip(indices, names, group["params"], strict=True):
            found = {
                kind: _as_shared(saved, f"{kind}.{name}", parameter)
                for kind in kinds
                if f"{kind}.{name}" in saved.shapes
            }
            found |= {
                kind: values_by_name[f"{kind}.{name}"]
                for kind in kinds
                if f"{kind}.{name}" in values_by_name
            }
            if found:
                state[index] = found
    run.optimizer.load_state_dict({"state": state, "param_groups": plain})


def _as_shared(saved: SavedTensors, name: str, parameter: Tensor) -> Tensor:
    """A saved tensor, shared among processes if its parameter is and has the same shape."""
    if not isinstance(parameter, DTensor) or saved.shapes[name] != list(parameter.shape):
        return saved.rows(name)
    rows = Rows.of(parameter)
    own = saved.rows(name, rows.start, len(rows.local)).to(rows.local.device)
    return as_shared(own, parameter)


def _random_state() -> dict[str, Any]:
    """Of Python, NumPy and torch in this process, as JSON holds it."""
    kind, keys, position, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_from_hex(text) for text in state["cuda"]])


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
