"""Text files that users write: CSV and JSON, read strictly.

A lenient reader loses data silently: it cuts a caption at a comma, lets an unclosed quote swallow
the rows below it, and takes the second of two equal keys. Here each of these is an error with its
line number. Lines end at a line feed, so that texts can contain other separators.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from mhla_gen.errors import MissingError, UserError


class Row(NamedTuple):
    """One row of a list."""

    place: str
    """What messages call it: its file and line."""
    values: dict[str, Any]


def read_text(path: Path, what: str) -> str:
    """The text of a file, with its own line endings, without a byte order mark.

    Args:
        path: The file.
        what: What messages call it, such as the setting that names it.

    Raises:
        MissingError: If there is no such file.
        UserError: If it is not UTF-8 text.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise MissingError(f"{what} {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{what} {path} is a folder, not a file") from None
    return decode_text(content, f"{what} {path}")


def decode_text(content: bytes, what: str) -> str:
    """UTF-8 text without a byte order mark.

    Raises:
        UserError: If it is none.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{what} contains NUL characters; save it as UTF-8 text")
    return text


def parse_json(text: str, where: str) -> Any:
    """A JSON value, in which no key is given twice and every number is finite.

    Raises:
        UserError: If it is no such value.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        if "\\u" in text:
            # Escapes can write half of a character, which no file takes.
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at character {error.pos + 1}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where} contains half a character ({error.reason})") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    return value


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: If it is anything else.
    """
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object in braces, found {_shortened(value)}")
    return value


def read_jsonl(path: Path, what: str) -> list[Row]:
    """The objects of a file with one per line; empty lines are ignored.

    Raises:
        MissingError: If there is no such file.
        UserError: If a line is no object.
    """
    rows = []
    for number, line in enumerate(read_text(path, what).split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            rows.append(Row(place, parse_object(line, place)))
    return rows


def read_csv(path: Path, what: str) -> list[Row]:
    """The rows of a file whose first line names the columns; empty lines are ignored.

    Raises:
        MissingError: If there is no such file.
        UserError: If a row has not one value for each column, or quotes do not close.
    """
    reader = csv.reader(io.StringIO(read_text(path, what), newline=""), strict=True)
    columns: list[str] = []
    rows = []
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return rows
        except csv.Error as error:
            raise UserError(f"{place} is not CSV: {_said(error)}") from error
        if not fields:
            continue
        if not columns:
            columns = _columns(fields, place)
        elif len(fields) != len(columns):
            raise UserError(
                f"{place} has {len(fields)} values for {len(columns)} columns; put a text with a "
                'comma in quotes: "a cat, a dog"'
            )
        else:
            rows.append(Row(place, dict(zip(columns, fields, strict=True))))


def _columns(fields: list[str], place: str) -> list[str]:
    columns = [field.strip() for field in fields]
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
        raise UserError(f"{place} must separate columns by commas, found {columns[0]!r}")
    if "" in columns:
        raise UserError(f"{place} has no name for column {columns.index('') + 1}")
    twice = [name for i, name in enumerate(columns) if name in columns[:i]]
    if twice:
        raise UserError(f"{place} has two columns called {twice[0]}")
    return columns


def _said(error: csv.Error) -> str:
    known = {
        "unexpected end of data": "a quote that opens here, or below, is never closed",
        "',' expected after '\"'": "a closing quote needs a comma after it, and a quote inside "
        'quotes is doubled, ""',
    }
    return known.get(str(error), str(error))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise UserError(f"the key {twice!r} is given twice")
    return found


def _constant(name: str) -> float:
    raise UserError(f"{name} is not a number in JSON")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
