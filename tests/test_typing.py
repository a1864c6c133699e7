"""A user's programs pass mypy --strict and pyright, with the package as its wheel installs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from paths import ROOT

PROGRAMS = sorted(ROOT.glob("tests/typed/*.py"))
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Without PYTHONPATH, which might name another copy of the package."""
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([*map(str, command)], cwd=cwd, env=alone, capture_output=True, text=True)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel, and behind it what this one has installed."""
    source, env = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("env")
    shutil.copytree(ROOT / "lmppl", source / "lmppl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    scheme = {"base": str(env), "platbase": str(env)}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    for command in (
        [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", "dist", "."],
        [sys.executable, "-m", "venv", "--without-pip", env],
        [*pip, "install", "--no-deps", "--no-index", "--target", site, "--find-links", "dist", "pyro-lmppl"],
    ):
        done = run(*command, cwd=source)
        assert done.returncode == 0, done.stdout + done.stderr
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    own = Path(sysconfig.get_path("scripts", "venv", scheme)) / "python"
    found = run(own, "-c", "import importlib.util as u; print(u.find_spec('lmppl').origin)", cwd=env).stdout
    assert Path(found).is_relative_to(site), found
    return own


@pytest.fixture
def programs(tmp_path: Path) -> list[str]:
    """The programs, and one with a mistake in each line but the first."""
    for path in PROGRAMS:
        shutil.copy(path, tmp_path)
    (tmp_path / "wrong.py").write_text(WRONG)
    return [path.name for path in PROGRAMS]


WRONG = """from lmppl.inference import Importance; from lmppl import LanguageModel
Importance(3)
Importance(print).run().table(3)
LanguageModel.embedded("stories").encode(b"bytes")
Importance(print).run().samples["z"].no_such_attribute
"""


def lines(found: str, of: str) -> set[int]:
    """Of one file, which lines are complained about, in what mypy or pyright prints line by line."""
    return {int(line.split(":")[1]) for line in found.splitlines() if Path(line.split(":")[0]).name == of}


def test_mypy_strict(python, programs, tmp_path):
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", python]
    found = run(*command, *programs, "wrong.py", cwd=tmp_path).stdout
    errors = "\n".join(line for line in found.splitlines() if " error: " in line)
    assert lines(errors, "wrong.py") == {2, 3, 4, 5}, found
    assert not any(lines(errors, name) for name in programs), found


def test_pyright(python, programs, tmp_path):
    pytest.importorskip("pyright")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", python]
    found = json.loads(run(*command, *programs, "wrong.py", cwd=tmp_path).stdout)
    by_file: dict[str, set[int]] = {}
    for d in found["generalDiagnostics"]:
        by_file.setdefault(Path(d["file"]).name, set()).add(d["range"]["start"]["line"] + 1)
    assert by_file == {"wrong.py": {2, 3, 4, 5}}, found
