"""Text to plain values: YAML and `key=value`, read by what the settings are.

YAML alone would turn a folder `0123` into 83, `off` into False and `12:30:00` into 45000. Here the
annotation of a setting decides: a text stays what was typed, a number and a choice are converted
where they are checked, and only where a setting takes values of several kinds is a kind guessed,
by the core schema of YAML 1.2.
"""

import contextlib
import dataclasses
import re
from typing import Any, cast, get_origin

import yaml

from mhla_gen.config.checks import is_list, is_mapping
from mhla_gen.config.fields import Kind, kind_of, kinds_of, truths
from mhla_gen.errors import UserError, one_line

_NULLS = ("null", "Null", "NULL")
_BOOLS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(
    r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan"
)
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+|\[\d+\])*", re.ASCII)
_MOST_VALUES = 100_000
"""Aliases let a small file stand for more values than fit in memory."""
_DEEPEST = 20
_ANY = Kind(Any, (), optional=True)


class ConfigError(UserError):
    """A config file or an override that does not fit; the message is one sentence for the user."""


def is_setting(argument: str) -> bool:
    """Whether a word of the command line is written as `key=value`."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and _KEY.fullmatch(key) is not None


def read_yaml(text: str, schema: type | None) -> dict[str, Any]:
    """The mapping that a YAML document holds.

    Raises:
        ConfigError: If it holds something else, is no YAML, or gives a key twice.
    """
    node = _compose(text)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("must be a mapping of keys to values")
    return _Reader().mapping(node, _ANY if schema is None else kind_of(schema))


def put_override(values: dict[str, Any], override: str, schema: type) -> None:
    """Set what a `key=value` says in values that a file gave.

    Raises:
        ConfigError: If it is not written so, or names no place in the values.
    """
    if not is_setting(override):
        raise ConfigError(
            f"settings are written key=value, for example max_steps=100, found {override!r}"
        )
    key, _, text = override.partition("=")
    *parents, last = re.findall(r"\w+", key)
    kind = kind_of(schema)
    place: dict[str, Any] | list[Any] = values
    for name in parents:
        kind = _child(kind, name)
        inner = _get(place, name, key)
        if not is_mapping(inner) and not is_list(inner):
            inner = dict[str, Any]()
            _set(place, name, inner, key)
        place = inner
    value = _typed(text, _child(kind, last), key)
    before = _get(place, last, key)
    if is_mapping(before) and is_mapping(value):
        value = _merged(before, value)
    _set(place, last, value, key)


def check_shapes(value: Any, annotation: Any, key: str = "") -> None:
    """Raise unless lists, mappings and single values stand where the settings have them.

    Raises:
        ConfigError: With the key and what belongs there.
    """
    kind = kind_of(annotation)
    if value is None or (kind.base is Any and not kind.is_text):
        return
    origin = get_origin(kind.base)
    schema = kind.base if dataclasses.is_dataclass(kind.base) else None
    if schema or origin is dict:
        if not is_mapping(value):
            example = f", such as {key}.{next(iter(kinds_of(schema)))}" if schema else ""
            raise ConfigError(f"{key} is a group of settings{example}; found {value!r}")
        for name, inner in value.items():
            element = kinds_of(schema).get(name, _ANY) if schema else kind_of(kind.element)
            path = f"{key}.{name}" if key else name
            # OmegaConf would fail to merge it into the default, if that is a list.
            if schema and name in kinds_of(schema) and element.base is Any and is_mapping(inner):
                raise ConfigError(f"{path} takes a value or a list, no mapping; found {inner!r}")
            check_shapes(inner, element, path)
    elif origin in (tuple, list) and not is_list(value):
        raise ConfigError(f"{key} must be a list in brackets, found {value!r}")
    elif is_list(value) and (origin in (tuple, list) or kind.base is Any):
        for i, inner in enumerate(value):
            check_shapes(inner, kind_of(kind.element), f"{key}[{i}]")
    elif isinstance(value, dict | list):
        raise ConfigError(f"{key} takes one value, found {value!r}")


def write_yaml(values: dict[str, Any]) -> str:
    """Settings as YAML that `read_yaml` reads as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that is no text when it is read."""

    def represent_text(self, text: str) -> yaml.Node:
        # PyYAML loses line separators that it writes between other quotes.
        plain = text.isprintable() and _scalar(text, _ANY, "") == text
        style = None if plain else '"'
        return self.represent_scalar(  # pyright: ignore[reportUnknownMemberType]
            "tag:yaml.org,2002:str", str(text), style=style
        )


_Dumper.add_representer(str, _Dumper.represent_text)
# OmegaConf hands on a class of its own for "???".
_Dumper.add_multi_representer(str, _Dumper.represent_text)


def _typed(text: str, kind: Kind, key: str) -> Any:
    """The value of an override: YAML where it is a list, a mapping or quoted, plain otherwise."""
    nested = text.startswith("[") and text.endswith("]")
    if kind.base is not str and (nested or (not kind.is_text and text[:1] in ("[", "{", '"', "'"))):
        try:
            return _Reader().value(_compose(text), kind, key)
        except ConfigError as error:
            raise ConfigError(f"{key}={one_line(text)} {error}") from error
    return _scalar(text, kind, key)


def _compose(text: str) -> yaml.Node | None:
    """The tree of a YAML document.

    Raises:
        ConfigError: With the problem and its line.
    """
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)  # pyright: ignore
        return cast("yaml.Node | None", tree)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", in line {mark.line + 1}"
        raise ConfigError(f"is not valid YAML: {error.problem or error.context}{where}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"is not valid YAML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise ConfigError("is nested too deeply") from error


class _Reader:
    """Turns the nodes of one document into values."""

    def __init__(self):
        self._open: set[int] = set()
        self._count = 0

    def value(self, node: yaml.Node | None, kind: Kind, key: str) -> Any:
        self._count += 1
        if self._count > _MOST_VALUES:
            raise ConfigError(f"holds more than {_MOST_VALUES} values")
        if node is None:
            return None
        if node.tag.startswith("!") or ":python/" in node.tag:
            raise ConfigError(f"has the unknown tag {node.tag}, in line {_line(node)}")
        if isinstance(node, yaml.ScalarNode):
            # A quoted word is a text, whatever it looks like.
            if node.style:
                return _escaped(node.value)
            return None if node.value in ("", "~") else _scalar(node.value, kind, key)
        if id(node) in self._open:
            raise ConfigError(f"contains itself, in line {_line(node)}")
        if len(self._open) > _DEEPEST:
            raise ConfigError(f"is nested too deeply, in line {_line(node)}")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, kind, key)
            element = kind_of(kind.element)
            return [self.value(each, element, f"{key}[{i}]") for i, each in enumerate(node.value)]
        finally:
            self._open.discard(id(node))

    def mapping(self, node: yaml.MappingNode, kind: Kind, key: str = "") -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for name, child in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"has a key that is not a word, in line {_line(name)}")
            word = name.value
            inner = f"{key}.{word}" if key else word
            if word == "<<" and not name.style:
                parts = child.value if isinstance(child, yaml.SequenceNode) else [child]
                for part in reversed(parts):
                    found = self.value(part, kind, key)
                    if not isinstance(found, dict):
                        raise ConfigError(
                            f"merges something that is not a mapping, in line {_line(name)}"
                        )
                    merged |= found
                continue
            if word in values:
                raise ConfigError(f"has the key {inner} twice, the second in line {_line(name)}")
            values[word] = self.value(child, _child(kind, word), inner)
        return merged | values


def _scalar(text: str, kind: Kind, key: str) -> Any:
    """A plain word as the value that a setting of this kind means by it."""
    nulls = _NULLS if kind.is_text else (*_NULLS, "", "~")
    if kind.optional and text in nulls:
        return None
    if kind.optional and text == "None" and kind.base is not Any and not kind.is_text:
        raise ConfigError(f"{key}=None is written {key}=null")
    if kind.base is bool:
        value = _BOOLS.get(text.lower())
        if value is None:
            raise ConfigError(f"{key} must be {truths(kind)}, found {text!r}")
        return value
    if kind.base in (int, float):
        try:
            return kind.base(text)
        except ValueError:
            number = "a whole number" if kind.base is int else "a number"
            raise ConfigError(f"{key} must be {number}, found {text!r}") from None
    if kind.base is not Any or kind.is_text:
        return _escaped(text)
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text[0] in "tT"
    # Python refuses to read whole numbers of thousands of digits.
    with contextlib.suppress(ValueError):
        if _WHOLE.fullmatch(text):
            return int(text)
        if _NUMBER.fullmatch(text):
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return _escaped(text)


def _escaped(text: str) -> str:
    """A text so that OmegaConf reads neither an interpolation nor a missing value in it."""
    if re.fullmatch(r"\\*\?\?\?", text):
        return "\\" + text
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)


def _child(kind: Kind, name: str) -> Kind:
    """The kind of a setting inside another one; unknown ones may be anything."""
    if dataclasses.is_dataclass(kind.base) and isinstance(kind.base, type):
        return kinds_of(kind.base).get(name, _ANY)
    return kind_of(kind.element)


def _get(place: dict[str, Any] | list[Any], name: str, key: str) -> Any:
    if isinstance(place, dict):
        return place.get(name)
    if not name.isdecimal() or int(name) >= len(place):
        raise ConfigError(f"{key}: the list before {name} has {len(place)} entries, counted from 0")
    return place[int(name)]


def _set(place: dict[str, Any] | list[Any], name: str, value: Any, key: str) -> None:
    if isinstance(place, dict):
        place[name] = value
    else:
        _get(place, name, key)
        place[int(name)] = value


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        inner = merged.get(name)
        if is_mapping(inner) and is_mapping(value):
            value = _merged(inner, value)
        merged[name] = value
    return merged


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
