"""The rules of the code base that a reader relies on, and what ends up in the wheel and in Flower's app bundle."""

from __future__ import annotations

import ast
import dataclasses
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedspine import __version__
from fedspine.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fedspine"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 350
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
WITHOUT_TORCH = sorted(
    [
        *(PACKAGE / "controller").rglob("*.py"),
        *(PACKAGE / "devices").rglob("*.py"),
        *(
            PACKAGE / name
            for name in ("types.py", "structure.py", "cost.py", "config.py", "surface.py", "schedule_only.py")
        ),
    ]
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and called(node.func) in (
            "__import__",
            "importlib.import_module",
            "import_module",
        ):
            found |= {str(arg.value).partition(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def called(node: ast.expr) -> str:
    """Dotted name of what is called."""
    if isinstance(node, ast.Attribute):
        return f"{called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_flower_is_imported_in_one_folder_only() -> None:
    users = {name(path) for path in SOURCES if "flwr" in imported(path)}
    assert users
    assert all(user.startswith("fedspine/flower/") for user in users)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_nothing_is_unpickled(path: Path) -> None:
    assert not imported(path) & PICKLERS
    for call in calls(path):
        assert called(call.func) not in ("torch.load", "torch.save", "numpy.load", "np.load", "pd.read_pickle")
        assert all(keyword.arg != "allow_pickle" for keyword in call.keywords)


@pytest.mark.parametrize("path", WITHOUT_TORCH, ids=name)
def test_decisions_name_no_torch(path: Path) -> None:
    assert not imported(path) & {"torch", "transformers", "peft"}


def test_decisions_load_no_torch() -> None:
    """Nor does anything that it imports."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in WITHOUT_TORCH
    ]
    code = f"import {', '.join(modules)}; import sys; print(sorted(sys.modules.keys() & {{'torch', 'flwr', 'ray'}}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_versions_agree() -> None:
    assert PROJECT["project"]["version"] == __version__


def test_flower_app_lists_every_key() -> None:
    """`flwr run --run-config` overrides only keys that are listed; an empty text is not set."""
    listed = PROJECT["tool"]["flwr"]["app"]["config"]
    assert list(listed) == [field.name for field in dataclasses.fields(RunConfig)]
    given = {key: value for key, value in listed.items() if value != ""}
    assert given == {"method": "fedspine"}
    assert RunConfig.from_values(given) == RunConfig()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks or would."""
    copy = tmp_path_factory.mktemp("checkout") / "fedspine-app"
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for line in filter(None, listing.stdout.decode().split("\0")):
        if (ROOT / line).is_file():
            (copy / line).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / line, copy / line)
    return copy


@pytest.mark.runtime
def test_flower_builds_the_app(checkout: Path) -> None:
    flwr = Path(sys.executable).with_name("flwr")
    result = subprocess.run(
        [flwr, "build", "--app", str(checkout)], cwd=checkout, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (bundle,) = checkout.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        files = set(archive.namelist())
    assert {name(path) for path in SOURCES} <= files
    assert {"pyproject.toml", "server/app.py", "clients/app.py", "README.md", "LICENSE"} <= files
    assert not {file for file in files if file.startswith(("tests/", "experiments/", "docker/"))}


@pytest.mark.runtime
def test_wheel_holds_the_package_only(checkout: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"),
            *("--disable-pip-version-check", "--wheel-dir", str(tmp_path), str(checkout)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        entry = archive.read(f"fedspine-{__version__}.dist-info/entry_points.txt").decode()
    assert {file.partition("/")[0] for file in files} == {"fedspine", f"fedspine-{__version__}.dist-info"}
    assert {name(path) for path in SOURCES} | {"fedspine/py.typed"} <= files
    assert "fedspine = fedspine.cli:main" in entry
