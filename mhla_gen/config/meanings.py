"""What settings mean: the text below each of them in the source."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from typing import Any

from mhla_gen.config.fields import Settings, kinds_of
from mhla_gen.config.reading import write_yaml

_COLUMNS = 100


@functools.cache
def meanings_of(schema: type) -> dict[str, str]:
    """The text below each setting of a config, in its source, in which None is YAML's null."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__[:-1]):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, after in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                meaning = " ".join(str(after.value.value).split())
                found[statement.target.id] = re.sub(r"\bNone\b", "null", meaning)
    return found


def explained(config: Settings) -> str:
    """A config as YAML, in which a comment above each setting says what it means."""
    return _explained(dataclasses.asdict(config), type(config), "")


def _explained(values: dict[str, Any], schema: type, indent: str) -> str:
    meanings, kinds = meanings_of(schema), kinds_of(schema)
    parts: list[str] = []
    for name, value in values.items():
        comment = textwrap.fill(
            meanings[name],
            _COLUMNS,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        base = kinds[name].base
        if isinstance(base, type) and dataclasses.is_dataclass(base) and value is not None:
            setting = f"{indent}{name}:\n" + _explained(value, base, f"{indent}  ")
        else:
            setting = textwrap.indent(write_yaml({name: value}), indent)
        parts.append(f"{comment}\n{setting}")
    return "".join(parts)
