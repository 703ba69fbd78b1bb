"""What the wheel installs, and what its entry points find there."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import Parser
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import guard_service

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "guard_api",
    "guard_middleware",
    "guard_policies",
    "guard_quantization",
    "guard_service",
)
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MOST_MIB = 16  # the starter guard may be 12 MB; the code is small
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what git would commit, so that nothing stray gets in."""
    pytest.importorskip("hatchling")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("needs the git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=copy, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return out / built.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_holds_the_packages_and_nothing_else(names: list[str]) -> None:
    info = f"{PROJECT['name'].replace('-', '_')}-{guard_service.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, info}


def test_every_package_is_typed(names: list[str]) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_and_data_file_of_the_tree_is_installed(
    names: list[str], package: str
) -> None:
    folder = next(path for path in (ROOT / package, *ROOT.glob(f"*/{package}")) if path.is_dir())
    ours = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    ignored = subprocess.run(
        ["git", "status", "--ignored", "--porcelain", "-z", str(folder)],
        cwd=ROOT,
        capture_output=True,
    ).stdout.decode()
    stray = {line[3:] for line in ignored.split("\0") if line.startswith("!!")}
    missing = {name for name in ours - set(names) if not any(name in one for one in stray)}
    assert not missing


def test_policies_and_contract_come_with_it(names: list[str]) -> None:
    for name in (
        "guard_policies/builtin/default.yaml",
        "guard_api/v1/guard.proto",
        "guard_api/v1/guard_pb2.py",
        "guard_api/v1/guard_pb2.pyi",
    ):
        assert name in names


def test_starter_guard_comes_with_it_and_fits(names: list[str], wheel: Path) -> None:
    if not (ROOT / "guard_service/models/starter/guard.json").exists():
        pytest.skip("the starter guard is not trained yet")
    starter = [name for name in names if name.startswith("guard_service/models/starter/")]
    assert "guard_service/models/starter/guard.json" in starter
    assert "guard_service/models/starter/MODEL_CARD.md" in starter
    sizes = {entry.filename: entry.file_size for entry in zipfile.ZipFile(wheel).infolist()}
    assert sum(sizes[name] for name in starter) <= 12_000_000


def test_wheel_is_small(wheel: Path, record_property: Callable[[str, object], None]) -> None:
    size = wheel.stat().st_size
    record_property("wheel_bytes", size)
    print(f"{wheel.name}: {size} bytes")
    assert size <= MOST_MIB * 2**20


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_version_is_the_packages_own(wheel: Path) -> None:
    assert metadata(wheel)["Version"] == guard_service.__version__


def test_base_install_is_light(wheel: Path) -> None:
    required = metadata(wheel).get_all("Requires-Dist") or []
    base = [requirement for requirement in required if "extra ==" not in requirement]
    heavy = ("torch", "transformers", "scikit-learn", "onnx>", "optimum")
    assert not [requirement for requirement in base if requirement.startswith(heavy)]


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_entry_point_is_callable(script: str) -> None:
    value = PROJECT["scripts"][script]
    module, _, _ = value.partition(":")
    if not any(
        (ROOT / folder / Path(*module.split("."))).with_suffix(".py").exists()
        or (ROOT / folder / Path(*module.split(".")) / "__init__.py").exists()
        for folder in (".", "middleware", "quantization")
    ):
        pytest.skip(f"{module} is not there yet")
    assert callable(EntryPoint(script, value, "console_scripts").load())


@pytest.mark.parametrize("package", ["guard_middleware", "guard_policies"])
def test_what_a_package_exports_is_there(package: str) -> None:
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None
