"""What is installed, and what importing it costs."""

import ast
import graphlib
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
    assert "mhla_gen/py.typed" in names and "mhla_gen/ops/naive.py" in names


def test_the_operator_imports_without_diffusers():
    code = "import sys, mhla_gen.ops; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ops ← models ← everything else ← cli; a package may import itself and what lies to its left.
LEVELS = {"ops": 0, "models": 1, "cli": 3}
MODULES = [p.relative_to(ROOT) for p in (ROOT / "mhla_gen").glob("*/**/*.py")]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_arrows_point_one_way(module):
    level = LEVELS.get(module.parts[1], 2)
    for package in packages_imported_by(module):
        if package in LEVELS:
            assert LEVELS[package] <= level, f"{module} imports {package}"


def test_no_two_packages_import_each_other():
    imports = {}
    for module in MODULES:
        package = module.parts[1]
        imports.setdefault(package, set()).update(packages_imported_by(module) - {package})
    # Imports inside functions count, too.
    graphlib.TopologicalSorter(imports).prepare()


def packages_imported_by(module):
    names = []
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return {name.split(".")[1] for name in names if name.startswith("mhla_gen.")}
