"""What one process does for all: its result, or its error, whatever that is."""

import json
import sys
from pathlib import Path

import pytest
from ranks import torchrun

from mhla_gen.errors import MissingError, UserError
from mhla_gen.runtime.processes import join_processes, on_main, part_processes


class Stubborn(Exception):
    """Pickles, and cannot be made again: of two arguments one is lost."""

    def __init__(self, one, two):
        super().__init__(one)
        self.two = two


def failing(error):
    def compute():
        raise error

    return compute


ERRORS = {
    "UserError": UserError("mend it"),
    "MissingError": MissingError("not there"),
    "KeyError": KeyError("key"),
    "RuntimeError": RuntimeError("CUDA"),
    "AssertionError": AssertionError(),
    "Stubborn": Stubborn("one", lambda: None),
}


def test_one_process_keeps_its_error():
    for error in ERRORS.values():
        with pytest.raises(type(error)) as raised:
            on_main(failing(error))
        assert raised.value is error


def test_every_process_gets_the_result_or_the_error(tmp_path):
    torchrun(2, __file__, tmp_path)
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert main == {"result": 7} | {name: [name, str(e)] for name, e in ERRORS.items()}
    told = ["RuntimeError", "Stubborn in the main process: one"]
    assert other == main | {"Stubborn": told}


if __name__ == "__main__":
    state = join_processes("cpu")
    found = {"result": on_main(lambda: 7)}
    for name, error in ERRORS.items():
        try:
            on_main(failing(error))
        except Exception as raised:
            found[name] = [type(raised).__name__, str(raised)]
    Path(sys.argv[1], f"{state.process_index}.json").write_text(json.dumps(found))
    part_processes()
