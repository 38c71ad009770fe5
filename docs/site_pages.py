"""Pages of the site that are made from the code: commands, the API, and what lies outside docs/.

A hook of MkDocs, see mkdocs.yml; `make docs` builds the site.
"""

import ast
import contextlib
import dataclasses
import json
import math
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mhla_gen.cli import COMMANDS
from mhla_gen.config import SCHEMAS, load_config
from mhla_gen.config.fields import Kind, Range, kind_of, kinds_of
from mhla_gen.config.meanings import meanings_of

ROOT = Path(__file__).parents[1]
TUTORIAL = "tutorial.ipynb"
# Files outside docs/ that are pages of their own. Others that pages link to are shown as source.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "mhla_gen/ops/README.md": "kernels.md",
}
API = {
    "mhla_gen": "Models: replace attention, save, load",
    "mhla_gen.ops": "The operator",
    "mhla_gen.data": "Data",
    "mhla_gen.training": "Training",
    "mhla_gen.distillation": "Distillation",
    "mhla_gen.sampling": "Sampling",
    "mhla_gen.evaluation": "Evaluation",
    "mhla_gen.inspection": "Inspection",
}
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made; a hook of MkDocs."""
    from mkdocs.structure.files import File

    made = dict(generated_pages())
    for file in files.documentation_pages():
        made[file.src_uri] = with_links(file.content_string, f"docs/{file.src_uri}")
        files.remove(file)
    sources = {
        page for page in _targets(made.values()) if page.startswith("source/") and page not in made
    }
    made |= {page: source_page(page) for page in sorted(sources)}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def generated_pages() -> Iterator[tuple[str, str]]:
    """Path and Markdown of every page that is made, but for those of sources."""
    for path, page in OUTSIDE.items():
        yield page, with_links((ROOT / path).read_text(encoding="utf-8"), path)
    yield "tutorial.md", notebook_page(ROOT / "docs" / TUTORIAL)
    yield "commands/index.md", commands_page()
    for name in COMMANDS:
        yield f"commands/{name.replace(' ', '-')}.md", command_page(name)
    for module, title in API.items():
        yield f"api/{module}.md", api_page(module, title)


def commands_page() -> str:
    """All commands in a table."""
    rows = [
        f"| [`mhla-gen {name}`]({name.replace(' ', '-')}.md) | {command.summary} |"
        for name, command in COMMANDS.items()
    ]
    return "\n".join(("# Commands\n", "| command | what it does |", "|---|---|", *rows, ""))


def command_page(name: str) -> str:
    """Usage, shipped configs and every setting of a command."""
    command, schema = COMMANDS[name], SCHEMAS[name]
    folder = f"{command.word} ({command.folder_key}) or " if command.folder_key else ""
    lines = [
        f"# mhla-gen {name}\n",
        f"{command.summary[0].upper()}{command.summary[1:]}.\n",
        "```bash",
        f"mhla-gen {name} {folder}CONFIG.yaml key=value …",
        "```\n",
        "`--dry-run` checks everything and does nothing; `--print-config` prints the settings.\n",
    ]
    shipped = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "configs").glob("*.yaml"))
        if isinstance(load_config(path), schema)
    ]
    if shipped:
        links = (f"[`{path}`](../source/{path}.md)" for path in shipped)
        lines.append(f"Configs to start from: {', '.join(links)}.\n")
    lines += ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for setting in settings_of(schema):
        cells = (f"`{setting.key}`", setting.values, setting.default, setting.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


@dataclasses.dataclass(frozen=True)
class Setting:
    """A line of the table of settings."""

    key: str
    values: str
    default: str
    meaning: str


def settings_of(schema: type, prefix: str = "", made: Any = None) -> Iterator[Setting]:
    """All settings of a config, those of configs in it with dotted keys.

    Args:
        schema: Its class.
        prefix: Of all keys.
        made: The config that has the defaults; by default one that is made of nothing.
    """
    with contextlib.suppress(ValueError):
        made = made or schema()
    meanings, kinds = meanings_of(schema), kinds_of(schema)
    for field in dataclasses.fields(schema):
        kind, key = kinds[field.name], f"{prefix}{field.name}"
        default = getattr(made, field.name, field.default)
        if isinstance(kind.base, type) and dataclasses.is_dataclass(kind.base):
            yield Setting(key, "settings", "" if default else "`null`", meanings[field.name])
            yield from settings_of(kind.base, f"{key}.", default)
            continue
        listed = isinstance(kind.element, type) and dataclasses.is_dataclass(kind.element)
        shown = "" if listed else _shown(default)
        yield Setting(key, values_of(kind), shown, meanings[field.name])
        if listed:
            yield from settings_of(kind.element, f"{key}[i].")


def values_of(kind: Kind) -> str:
    """What a setting takes, in words."""
    if get_origin(kind.base) is Literal:
        said = ", ".join(str(choice).lower() for choice in get_args(kind.base))
    elif get_origin(kind.base) in (list, tuple):
        inner = kind_of(kind.element)
        said = f"list of {values_of(inner)}s" if inner.base in (int, float) else "list"
    elif kind.base is bool:
        said = "true, false"
    elif kind.base in (int, float):
        said = "whole number" if kind.base is int else "number"
        limits = kind.mark(Range)
        if limits is not None and limits.low > -math.inf:
            said += f" {'above' if limits.open_low else 'from'} {limits.low:g}"
            far = limits.high in (math.inf, 2**31 - 1, 2**32 - 1)
            said += "" if far else f" {'below' if limits.open_high else 'to'} {limits.high:g}"
    elif kind.is_text:
        said = "text"
    else:
        said = "see its meaning"
    return f"{said}; null" if kind.optional and kind.base is not Any else said


def _shown(default: Any) -> str:
    if default is dataclasses.MISSING:
        return ""
    return f"`{json.dumps(default, ensure_ascii=False)}`"


def api_page(module: str, title: str) -> str:
    """The public names of a module, which mkdocstrings documents."""
    # diffusers looks for ModelMixin in our package; it is documented there.
    names = [name for name in public_names(module) if name not in ("ModelMixin", "__version__")]
    return "\n".join([f"# {title}\n", *(f"::: {module}.{name}\n" for name in names)])


def public_names(module: str) -> list[str]:
    """A module's `__all__`, without importing it."""
    tree = ast.parse((ROOT / module.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return sorted(ast.literal_eval(statement.value), key=str.lower)
    raise ValueError(f"{module} has no __all__")


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, and its code without outputs."""
    parts = []
    for cell in json.loads(path.read_bytes())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def source_page(page: str) -> str:
    """A file of the repository, as it is."""
    path = page.removeprefix("source/").removesuffix(".md")
    language = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json"}.get(
        Path(path).suffix, "text"
    )
    text = (ROOT / path).read_text(encoding="utf-8").rstrip()
    return f"# {path}\n\n````{language}\n{text}\n````\n"


def with_links(text: str, path: str) -> str:
    """Markdown of a file of the repository, with links to where the site has what they mean."""
    here = posixpath.dirname(_site_path(path))

    def moved(match: re.Match[str]) -> str:
        target, hash_, anchor = match[0].partition("#")
        if not target or re.match(r"\w+:", target):
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        return posixpath.relpath(_site_path(place), here or ".") + hash_ + anchor

    return _LINK.sub(moved, text)


def _site_path(path: str) -> str:
    if path in OUTSIDE:
        return OUTSIDE[path]
    path = path.replace(TUTORIAL, "tutorial.md")
    shown = path.startswith("docs/") and not path.endswith(".json")
    return path.removeprefix("docs/") if shown else f"source/{path}.md"


def _targets(texts: Any) -> set[str]:
    links = {link for text in texts for link in _LINK.findall(text)}
    return {posixpath.normpath(link).removeprefix("../") for link in links}


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(f"<!-- {page} -->\n{text}" for page, text in generated_pages()))
