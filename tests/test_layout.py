"""The shape of the repository: links that cannot be imported, and arrows that run downward only."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from paths import ROOT

# Lower may not import higher. `embedded` ships models; only `View.embedded` reaches for it, when called.
LAYERS = {
    "text": 0,
    "shapes": 0,
    "randomness": 0,
    "rows": 0,
    "tools": 0,
    "activations": 0,
    "layers": 0,
    "positions": 0,
    "suitable": 0,
    "spelling": 0,
    "chat": 0,
    "stop_strings": 0,
    "catalogue": 0,
    "locks": 0,
    "hub": 0,
    "markup": 0,
    "progress": 0,
    "files": 1,
    "damage": 2,
    "parts": 1,
    "ngram": 1,
    "vocabulary": 1,
    "loading": 2,
    "passes": 2,
    "adapters": 2,
    "gguf_files": 2,
    "encoding": 2,
    "view": 3,
    "language_model": 3,
    "masked_language_model": 3,
    "embedded": 4,
    "engine": 4,
    "constraints": 5,
    "distributions": 5,
    "inference": 6,
    "models": 7,
    "testing": 7,
    "pretrained": 7,
    "command_help": 7,
    "command_options": 8,
    "command_results": 8,
    "command_output": 7,
    "command_record": 7,
    "command_report": 8,
    "cli": 8,
}
# The same inside `inference`, one after the other.
WINGS = ["core", "posterior", "processes", "samplers", "training", "judging"]


@pytest.mark.parametrize("name", ["models", "inference"])
def test_the_links_show_the_packages_and_cannot_be_imported(name):
    link = ROOT / name
    assert link.is_symlink() and link.resolve() == ROOT / "lmppl" / name
    run = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and f"ImportError: import lmppl.{name}, not {name}" in run.stderr


@cache
def imported(path: Path) -> list[tuple[str, ...]]:
    """What a file below the repository imports, relatively or not, by the parts of its name."""
    found, module = [], path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(*name.name.split("."),) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module[: -node.level] if node.level else ()
            base += (*node.module.split("."),) if node.module else ()
            found += [(*base, name.name) for name in node.names]
    return found


def arrows(root: Path) -> Iterator[tuple[str, str, Path]]:
    """A part of a package, another part that it imports, and the file that does so."""
    package = root.relative_to(ROOT).parts
    depth = len(package)
    for path in sorted(root.rglob("*.py")):
        part = path.relative_to(root).parts[0].removesuffix(".py")
        others = {name[depth] for name in imported(path) if name[:depth] == package and len(name) > depth}
        for other in others - {part}:
            yield part, other, path.relative_to(ROOT)


@pytest.mark.parametrize(
    "package", ["lmppl", "lmppl.inference", "lmppl.distributions", "lmppl.constraints", "lmppl.models"]
)
def test_no_public_name_hides_a_module(package):
    """What is public is a module itself, or has a name that no module of the package has."""
    found = import_module(package)
    for name in found.__all__:
        assert find_spec(f"{package}.{name}") is None or inspect.ismodule(getattr(found, name)), f"{package}.{name}"


def test_arrows_run_downward_only():
    for part, other, path in arrows(ROOT / "lmppl"):
        if part not in ("__init__", "__main__") and other in LAYERS:
            assert part in LAYERS, f"{path}: where does it belong?"
            lazy = (part, other) == ("view", "embedded")
            assert LAYERS[other] <= LAYERS[part] or lazy, f"{path} imports lmppl.{other}"


def test_the_wings_of_inference_need_only_those_before_them():
    """Also in functions: no circle hides in a lazy import."""
    assert {path.name for path in (ROOT / "lmppl/inference").iterdir()} - {"__pycache__"} == {*WINGS, "__init__.py"}
    for part, other, path in arrows(ROOT / "lmppl" / "inference"):
        if part != "__init__":
            assert other in WINGS, f"{path} imports {other} from lmppl.inference"
            assert WINGS.index(other) < WINGS.index(part), f"{path} imports lmppl.inference.{other}"


def test_programs_know_nothing_of_what_they_are_run_on():
    """A page of `models/programs` is read by itself; `labels` has what follows from two factors, whatever they are."""
    for part, other, path in arrows(ROOT / "lmppl" / "models"):
        if part == "programs":
            assert other == "labels", f"{path} imports {other} from lmppl.models"


def test_what_is_installed_needs_nothing_that_is_not():
    names = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} - {"lmppl", "inference", "models"}
    assert {"worlds", "benchmarks"} <= names
    for path in (ROOT / "lmppl").rglob("*.py"):
        assert not {name[0] for name in imported(path)} & names, path


def modules_of(tree: ast.AST) -> set[str]:
    """The names that stand for modules of the package in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {n.asname or "lmppl" for n in node.names if n.name.split(".")[0] == "lmppl"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lmppl":
            path = ROOT.joinpath(*node.module.split("."))
            found |= {
                n.asname or n.name for n in node.names if (path / n.name).is_dir() or (path / f"{n.name}.py").exists()
            }
    return found


def patches(tree: ast.AST) -> Iterator[ast.AST]:
    """Where a file replaces what a module of the package keeps to itself: a private name, or any global of a module."""
    modules = modules_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assigned = isinstance(node.ctx, ast.Store | ast.Del) and re.match("_[^_]", node.attr)
            if node.attr == "__globals__" or (assigned and ast.unparse(node.value) != "self"):
                yield node
        elif isinstance(node, ast.Call) and len(node.args) >= 2:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target, name = (ast.unparse(a).strip("'\"") for a in node.args[:2])
            if called in ("setattr", "delattr", "object", "patch") and (
                name.startswith("_") or target.startswith("lmppl.") or target in modules
            ):
                yield node


def test_no_test_replaces_what_a_module_keeps_to_itself():
    """Tests set `TUNING`, pass an object of their own, or replace what another package documents."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        found = [
            f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
            for node in patches(ast.parse(path.read_text()))
        ]
        assert not found, found
    for fault in (
        "from lmppl.engine import chunks\nm.setattr(chunks, 'fitting', f)",
        "import lmppl.files as there\nm.setattr(there, 'write', f)",
        "m.setattr('lmppl.files.write', f)",
        "m.setattr(lm, '_adapter', None)",
        "lm._adapter = None",
        "f.__globals__['run']",
    ):
        assert [*patches(ast.parse(fault))], fault
