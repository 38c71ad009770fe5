"""What is installed, and what importing it costs."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mhla_gen

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", mhla_gen.__all__)
def test_public_names_exist(name):
    assert getattr(mhla_gen, name) is not None


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'inject_all'"):
        _ = mhla_gen.inject_all


def test_the_wheel_holds_one_package(tmp_path):
    source = tmp_path / "source"
    # From a copy: a build leaves files behind, and picks up those of an earlier one.
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(ROOT, source, ignore=ignore)
    # --no-isolation takes setuptools from the environment, so that no network is needed.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    subprocess.run([*command, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names}
    assert {name for name in packages if not name.endswith(".dist-info")} == {"mhla_gen"}
    assert {"mhla_gen/py.typed", "mhla_gen/inspection/page.html"} <= set(names)
    assert "mhla_gen/ops/naive.py" in names


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone")
def test_git_ignores_no_module():
    names = "\n".join(map(str, [*MODULES, "mhla_gen/py.typed", "mhla_gen/inspection/page.html"]))
    command = ["git", "-C", ROOT, "check-ignore", "--stdin"]
    ignored = subprocess.run(command, input=names, capture_output=True, text=True)
    assert ignored.stdout == "" and ignored.returncode == 1


def test_the_operator_imports_without_diffusers():
    code = "import os, sys, mhla_gen.ops; os._exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


MODULES = [p.relative_to(ROOT) for p in (ROOT / "mhla_gen").rglob("*.py")]
MODULES.remove(Path("mhla_gen", "__init__.py"))


def package_of(module):
    return module.with_suffix("").parts[1]


def floors():
    """Package → its floor, the lowest 0, as CONTRIBUTING.md draws them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawn = re.search(r"reads them here:\n\n((?:    .*\n)+)", text)[1].strip().splitlines()
    return {
        name: i for i, line in enumerate(reversed(drawn)) for name in line.split() if name != "·"
    }


def test_every_package_is_on_a_floor():
    assert set(floors()) == {package_of(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_package_imports_from_floors_below(module):
    floor, package = floors(), package_of(module)
    # Imports inside functions count, too.
    for other in packages_imported_by(module) - {package}:
        assert floor[other] < floor[package], f"{module} imports {other}"


SCRIPTS = [p for folder in ("benchmarks", "experiments") for p in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_import_names_that_exist(script):
    """Most scripts need a GPU or data, so that no other test runs them."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mhla_gen"):
            if "kernels" in node.module:
                pytest.importorskip("triton")
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def packages_imported_by(module):
    names = []
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return {name.split(".")[1] for name in names if name.startswith("mhla_gen.")}


def decides_by_locale(call):
    """Whether a call reads or writes text in the encoding of the locale: on Windows, not UTF-8."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name = ast.unparse(call.func).rpartition(".")[2]
    method = isinstance(call.func, ast.Attribute)
    if "encoding" in given:
        return False
    if name in ("read_text", "write_text"):
        return method and len(call.args) == (name == "write_text")
    if name == "open":
        place = 0 if method else 1
        mode = call.args[place : place + 1] or [given.get("mode", ast.Constant("r"))]
        # A mode, not the first argument of another `open`.
        letters = mode[0].value if isinstance(mode[0], ast.Constant) else "b"
        return set(str(letters)) <= set("rwax+t") and len(call.args) <= place + 1
    return "text" in given or "universal_newlines" in given


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("path.read_text()", True),
        ('path.write_text("a", errors="replace")', True),
        ('path.open("a")', True),
        ("path.open()", True),
        ('open(path, "w")', True),
        ("open(path)", True),
        ("subprocess.run(command, text=True)", True),
        ('path.read_text("utf-8")', False),
        ('path.write_text("a", encoding="utf-8")', False),
        ('path.open("rb")', False),
        ('open(path, mode="wb")', False),
        ('archive.open(entry, "w")', False),
        ("Image.open(path)", False),
        ('read_text(path, "caption")', False),
    ],
)
def test_text_in_the_encoding_of_the_locale_is_found(code, found):
    assert decides_by_locale(ast.parse(code, mode="eval").body) == found


def test_text_files_are_utf_8_everywhere():
    folders = ("mhla_gen", "benchmarks", "experiments", "docs", "train", "sample", "metrics")
    places = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and decides_by_locale(node)
    ]
    assert not places
