"""What a check returns."""

from typing import Literal, NamedTuple

State = Literal["ok", "absent", "broken"]
"""absent is fine: something optional is not there."""


class Result(NamedTuple):
    """State, what was seen, and what to do."""

    state: State
    detail: str
    remedy: str = ""
