"""Pages of the site: made from the code, whole, with links that lead somewhere."""

import importlib.util
import json
import re
import tempfile
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

from mhla_gen.cli import COMMANDS
from mhla_gen.config import SCHEMAS, to_yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "mhla_gen/ops/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(part):
    if isinstance(part, dict):
        part = list(part.values())
    return [part] if isinstance(part, str) else [page for inner in part for page in entries(inner)]


def test_every_page_is_in_the_navigation(site):
    nav = entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(nav) == written | {page for page, _ in site.generated_pages()}
    assert len(nav) == len(set(nav))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_a_command_has_every_setting(name, site):
    settings = {setting.key: setting for setting in site.settings_of(SCHEMAS[name])}
    assert all(setting.meaning and setting.values for setting in settings.values())
    try:
        made = yaml.safe_load(to_yaml(SCHEMAS[name]()))
    except ValueError:  # a command that cannot do without a setting
        made = {}
    del made["job"]

    def check(values, prefix):
        for key, value in values.items():
            assert f"`{prefix}{key}`" in page
            if isinstance(value, dict) and is_dataclass(site.kinds_of(SCHEMAS[name])[key].base):
                check_inner(value, f"{prefix}{key}.")

    def check_inner(values, prefix):
        for key in values:
            assert f"{prefix}{key}" in settings

    page = site.command_page(name)
    check(made, "")


def test_defaults_are_those_of_the_command(site):
    settings = {setting.key: setting for setting in site.settings_of(SCHEMAS["train"])}
    made = SCHEMAS["train"]()
    for key in ("samples.num_images", "evaluation.samples.num_images", "learning_rate"):
        value = made
        for part in key.split("."):
            value = getattr(value, part)
        assert settings[key].default == f"`{json.dumps(value)}`"
    assert settings["distill"].default == "`null`" and "distill.stages[i].kind" in settings


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path, site):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        target = link.partition("#")[0]
        if target and not re.match(r"\w+:", target):
            assert (path.parent / target).exists(), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_result_files_are_linked(path):
    """The site shows them as pages."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    named = re.findall(r"`(?:docs/results/)?([\w./-]+\.json)`", text)
    assert not [name for name in named if (ROOT / "docs" / "results" / name).exists()]


def test_links_between_pages_follow_them(site):
    text = site.with_links("[a](docs/data.md#x) [b](LICENSE) [c](https://a.b/c)", "README.md")
    assert text == "[a](data.md#x) [b](source/LICENSE.md) [c](https://a.b/c)"
    text = site.with_links("[a](../README.md) [b](results/x.png)", "docs/data.md")
    assert text == "[a](index.md) [b](results/x.png)"
    assert site.with_links("[a](docs/tutorial.ipynb)", "README.md") == "[a](tutorial.md)"
    text = site.with_links("[a](docs/results/x.json)", "README.md")
    assert text == "[a](source/docs/results/x.json.md)"


def run_tutorial(steps):
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "max_steps=400" in code
    names = {}
    exec(code.replace("max_steps=400", f"max_steps={steps}"), names)
    return names


def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = run_tutorial(2)
    assert names["row"].size == (640, 64)


@pytest.mark.slow
def test_the_tutorial_draws_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = run_tutorial(400)
    lines = (names["folder"] / "run" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.6 * losses[0]
