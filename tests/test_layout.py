"""The shape of the repository: links that cannot be imported, and arrows that run downward only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lower may not import higher. `embedded` ships models; only `LanguageModel.embedded` reaches for it, when called.
LAYERS = {
    "text": 0,
    "randomness": 0,
    "tools": 0,
    "activations": 0,
    "positions": 0,
    "spelling": 0,
    "chat": 0,
    "stop_strings": 0,
    "catalogue": 0,
    "locks": 0,
    "files": 1,
    "parts": 1,
    "ngram": 1,
    "vocabulary": 1,
    "adapters": 2,
    "gguf_files": 2,
    "language_model": 3,
    "embedded": 4,
    "engine": 4,
    "constraints": 5,
    "distributions": 5,
    "inference": 6,
    "models": 7,
    "testing": 7,
    "pretrained": 7,
    "command_help": 7,
    "cli": 8,
}


@pytest.mark.parametrize("name", ["models", "inference"])
def test_the_links_show_the_packages_and_cannot_be_imported(name):
    link = ROOT / name
    assert link.is_symlink() and link.resolve() == ROOT / "lmppl" / name
    run = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and f"ImportError: import lmppl.{name}, not {name}" in run.stderr


def imported(tree: ast.AST, module: tuple[str, ...]) -> set[str]:
    """The parts of lmppl that a module imports, relatively or not; ``module`` is its path below the repository."""
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*module[: -node.level], *(node.module.split(".") if node.module else [])]
            node = ast.ImportFrom(module=".".join(base), names=node.names, level=0)
        if isinstance(node, ast.Import):
            parts |= {name.name.split(".")[1] for name in node.names if name.name.startswith("lmppl.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "lmppl":
            parts |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lmppl."):
            parts.add(str(node.module).split(".")[1])
    return parts & set(LAYERS)


def test_arrows_run_downward_only():
    for path in sorted((ROOT / "lmppl").rglob("*.py")):
        part = path.relative_to(ROOT / "lmppl").parts[0].removesuffix(".py")
        if part not in LAYERS:
            continue
        module = path.relative_to(ROOT).with_suffix("").parts
        for other in imported(ast.parse(path.read_text()), module) - {part}:
            lazy = (part, other) == ("language_model", "embedded")
            assert LAYERS[other] <= LAYERS[part] or lazy, f"{path.relative_to(ROOT)} imports lmppl.{other}"
