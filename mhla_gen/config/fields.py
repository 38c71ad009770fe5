"""What the annotation of a setting says about its values, and the one place that checks it.

A number is annotated with its `Range`, text that names a file or folder with `PATH`, and what may
be a text or a list of texts with `TEXT`. `Settings` checks them whenever a config is made, from a
file or in Python.
"""

import functools
import math
import os
import types
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from mhla_gen.config.checks import LARGEST, check_choice, elements
from mhla_gen.errors import UserError


class Range(NamedTuple):
    """The finite numbers that a setting takes; NaN and infinity are none of them."""

    low: float
    high: float = math.inf
    open_low: bool = False
    """The low end itself is no value."""
    open_high: bool = False

    def check(self, name: str, value: Any, whole: bool) -> None:
        """Raise unless `value` is such a number."""
        kinds = int if whole else (int, float)
        # bool is an int in Python, and is a mistake here.
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"{name} must be {'a whole' if whole else 'a'} number, found {value!r}")
        low = value > self.low if self.open_low else value >= self.low
        high = value < self.high if self.open_high else value <= self.high
        if not (math.isfinite(value) and low and high):
            raise UserError(f"{name} must be {self._said(low)}, found {value}")

    def _said(self, low: bool) -> str:
        """What is allowed, for a number that is, or is not, above the low end."""
        if self.high in (math.inf, LARGEST):
            if not low:
                return f"{'above' if self.open_low else 'at least'} {self.low}"
            return "a finite number" if self.high == math.inf else f"at most {self.high}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {left}{self.low}, {self.high}{right}"


class Text(NamedTuple):
    """A text, or several of them, kept as they were typed."""

    path: bool = False
    """It names a file or a folder: `~` stands for the home folder."""


TEXT = Text()
PATH = Text(path=True)

Count = Annotated[int, Range(1, LARGEST)]
Whole = Annotated[int, Range(0, LARGEST)]
Side = Annotated[int, Range(1, 65_535)]
"""Pixels along a side of an image; libraries of images overflow with more."""
DEPTHS = Range(0, 1000)
"""Blocks of a transformer, which is built block by block; the deepest have about a hundred."""
Depth = Annotated[int, DEPTHS._replace(low=1)]
MOST_WORKERS = 1024
"""Processes or threads, more than a machine has cores."""
AtLeastTwo = Annotated[int, Range(2, LARGEST)]
SEEDS = Range(0, 2**32 - 1)
"""NumPy's generators take no other."""
Seed = Annotated[int, SEEDS]
Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Finite = Annotated[float, Range(-math.inf)]
Guidance = Annotated[float, Range(1)]
Fraction = Annotated[float, Range(0, 1, open_high=True)]
ProfileWidth = Annotated[float, Range(0.001, 0.28)]
FilePath = Annotated[str, PATH]
FilePaths = Annotated[Any, PATH]
"""One of them or a list."""
Texts = Annotated[Any, TEXT]
"""One text or a list."""


class Kind(NamedTuple):
    """An annotation, taken apart."""

    base: Any
    marks: tuple[Any, ...]
    optional: bool

    def mark(self, wanted: type) -> Any:
        """The mark of a type, or None."""
        return next((mark for mark in self.marks if isinstance(mark, wanted)), None)

    @property
    def is_text(self) -> bool:
        """Whether what was typed is the value."""
        return self.base is str or self.mark(Text) is not None

    @property
    def element(self) -> Any:
        """Annotation of the elements of a list or the values of a mapping."""
        if self.base is Any and self.is_text:
            return str
        args = get_args(self.base)
        if get_origin(self.base) is dict:
            return args[1]
        return args[0] if get_origin(self.base) in (tuple, list) else Any


def kind_of(annotation: Any) -> Kind:
    """Take an annotation apart: `Annotated[int, Range(1)] | None` is a marked int, optional."""
    if isinstance(annotation, Kind):
        return annotation
    marks: tuple[Any, ...] = ()
    optional = False
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation, *found = get_args(annotation)
            marks += tuple(found)
        elif origin in (Union, types.UnionType):
            rest = [arg for arg in get_args(annotation) if arg is not types.NoneType]
            optional = optional or len(rest) < len(get_args(annotation))
            if len(rest) > 1:
                return Kind(Any, marks, optional)
            annotation = rest[0]
        else:
            return Kind(annotation, marks, optional or annotation is Any)


@functools.cache
def kinds_of(schema: type) -> dict[str, Kind]:
    """The settings of a dataclass by name."""
    hints = get_type_hints(schema, include_extras=True)
    return {name: kind_of(hint) for name, hint in hints.items()}


@functools.cache
def path_settings(schema: type) -> frozenset[str]:
    """The settings that name files or folders, with dots between levels."""
    found: set[str] = set()
    for name, kind in kinds_of(schema).items():
        if (text := kind.mark(Text)) and text.path:
            found.add(name)
        elif isinstance(kind.base, type) and issubclass(kind.base, Settings):
            found |= {f"{name}.{inner}" for inner in path_settings(kind.base)}
    return frozenset(found)


_GROUP: ContextVar[str | None] = ContextVar("group", default=None)


@contextmanager
def in_group(prefix: str) -> Generator[None]:
    """Name settings inside by their keys in a command's config, as in `model.mhla.exact`."""
    before = _GROUP.set(prefix)
    try:
        yield
    finally:
        _GROUP.reset(before)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every config: checks numbers, choices and paths by their annotations.

    Raises:
        ValueError: If a value is not one that its annotation allows.
    """

    def __init_subclass__(cls, prefix: str = "", **kwargs: Any) -> None:
        """Keep the prefix of these settings' keys, for where `in_group` gives no other."""
        super().__init_subclass__(**kwargs)
        cls._prefix = prefix

    def __post_init__(self) -> None:
        """Check every setting, and expand `~` in paths."""
        for name, kind in kinds_of(type(self)).items():
            value = getattr(self, name)
            checked = _checked(self.key(name), value, kind)
            if checked is not value:
                self._settle(**{name: checked})

    @classmethod
    def key(cls, name: str) -> str:
        """What a message calls a setting."""
        group = _GROUP.get()
        return f"{cls._prefix if group is None else group}{name}"

    def _settle(self, **values: Any) -> None:
        """Replace settings by their normal forms, in `__post_init__` only."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _checked(name: str, value: Any, kind: Kind) -> Any:
    if value is None and kind.optional:
        return value
    if get_origin(kind.base) is tuple and (listed := elements(value)) is not None:
        element = kind_of(kind.element)
        return tuple(_checked(name, each, element) for each in listed)
    if get_origin(kind.base) is Literal:
        check_choice(name, value, get_args(kind.base))
    elif limits := kind.mark(Range):
        limits.check(name, value, whole=kind.base is int)
    elif kind.base is bool and not isinstance(value, bool):
        raise UserError(f"{name} must be {truths(kind)}, found {value!r}")
    elif (text := kind.mark(Text)) and text.path:
        return expand_home(name, value)
    return value


def truths(kind: Kind) -> str:
    """The values of a setting that is true or false, for a message."""
    return "true, false or null" if kind.optional else "true or false"


def expand_home(name: str, value: Any) -> Any:
    """A path, or a list of paths, with `~` replaced by the home folder it names.

    Raises:
        ValueError: If there is no such home folder.
    """
    if (listed := elements(value)) is not None:
        return tuple(expand_home(name, each) for each in listed)
    if isinstance(value, os.PathLike):
        value = os.fspath(cast("os.PathLike[str]", value))
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    expanded = os.path.expanduser(value)
    if expanded == value:
        raise UserError(
            f"{name}: there is no home folder {value.split(os.sep)[0]}; write ./{value} for a "
            "file or folder of that name"
        )
    return expanded
