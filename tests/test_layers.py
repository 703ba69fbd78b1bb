"""Imports go one way, and light packages stay light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "guard_api": "proto",
    "guard_policies": "policies",
    "guard_service": ".",
    "guard_middleware": "middleware",
    "guard_quantization": "quantization",
}
# What each package may import of ours, besides itself. A longer name opens one module of a package,
# or holds one module to a rule of its own.
MAY_IMPORT = {
    "guard_api": (),
    "guard_policies": (),
    "guard_service": ("guard_api", "guard_policies"),
    # guardctl is a client that ships with the service; the server never imports it.
    "guard_service.cli": ("guard_api", "guard_policies", "guard_service", "guard_middleware"),
    "guard_middleware": ("guard_api", "guard_policies"),
    # Loaded only where a middleware is told to have its guard in its own process.
    "guard_middleware.in_process": ("guard_service",),
    # One place says how the lines of logs look.
    "guard_middleware.flags": ("guard_service.logs",),
    # One place sets up OpenTelemetry's SDK for the two commands that serve.
    "guard_middleware.traces": ("guard_service.tracing.exporting", "guard_service.__version__"),
    # The student is distilled with the very prompts that serve it, and exported into the artifact
    # that is served; figures and limits are those that guardctl has for a running guard. Of the
    # server itself the pipeline knows nothing.
    "guard_quantization": (
        "guard_policies",
        "guard_service.prompt",
        "guard_service.templates",
        "guard_service.tokenizer",
        "guard_service.conversation",
        "guard_service.artifact",
        "guard_service.manifest",
        "guard_service.engines",
        "guard_service.evaluation",
    ),
}
HEAVY = ("torch", "transformers", "sklearn", "onnx", "optimum", "matplotlib")
FORBIDDEN_IN_SERVER = "guard_service.cli"


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of ours by its dotted name."""
    for package, folder in FOLDERS.items():
        base = ROOT / folder
        for path in sorted((base / package).rglob("*.py")):
            dotted = ".".join(path.relative_to(base).with_suffix("").parts)
            yield dotted.removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file names in its imports, wherever they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name their package in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in FOLDERS)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_packages_import_only_what_the_table_allows() -> None:
    wrong = []
    for module, path in modules():
        rule = max((name for name in MAY_IMPORT if is_within(module, name)), key=len)
        allowed = (rule, module.partition(".")[0], *MAY_IMPORT[rule])
        wrong += [
            f"{module} imports {name}"
            for name in imports(path)
            if not any(is_within(name, one) for one in allowed)
        ]
    assert not wrong, "\n".join(wrong)


def test_server_does_not_import_the_command_line() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        if not is_within(module, FORBIDDEN_IN_SERVER)
        for name in imports(path)
        if is_within(name, FORBIDDEN_IN_SERVER)
    ]
    assert not wrong, "\n".join(wrong)


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def all_of(package: str, without: str = "") -> str:
    names = (name for name, _ in modules() if is_within(name, package) and name != without)
    return "\n".join(f"import {name}" for name in names)


HELP = """
sys.argv = ["guardctl", "--help"]
from guard_service.cli import main
try:
    main()
except SystemExit:
    pass
"""


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        (all_of("guard_policies"), ("onnxruntime", "tokenizers", "numpy", "grpc", *HEAVY)),
        (
            all_of("guard_middleware", "guard_middleware.in_process"),
            ("onnxruntime", "tokenizers", "numpy", "PIL", "typer", "rich", *HEAVY),
        ),
        # What a sidecar that traces loads besides.
        (
            "import guard_service.tracing.exporting",
            ("onnxruntime", "tokenizers", "numpy", "PIL", *HEAVY),
        ),
        ("import guard_service.__main__", HEAVY),
        # What decodes and fetches images is loaded by the processes and policies that do so.
        ("import guard_service.server, guard_service.engines.onnx", (*HEAVY, "PIL", "aiohttp")),
        (HELP, ("onnxruntime", "tokenizers", "numpy", "grpc", "google", "yaml", *HEAVY)),
    ],
    ids=[
        "policies",
        "middleware",
        "tracing",
        "guard-service",
        "server with onnx",
        "guardctl --help",
    ],
)
def test_light_packages_stay_light(code: str, unwanted: tuple[str, ...]) -> None:
    if "guard_service.__main__" in code and not (ROOT / "guard_service/__main__.py").exists():
        pytest.skip("the server's entry point is not there yet")
    assert not loaded_by(code) & set(unwanted)
