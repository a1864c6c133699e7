"""Saving into a directory: all files of one save become visible together, and files of other programs are not touched.

A save is written into a hidden folder of the directory. When all of it is on the disk, the folder is renamed; from then
on this save is the valid one, whatever happens. Its files are moved to their names afterwards; if the writer is killed
before, the next process does it. A manifest lists what the package wrote, with sizes and hashes; only these files are
ever replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from lmppl.locks import locked

T = TypeVar("T")
MANIFEST, FORMAT = "lmppl.json", "lmppl files 1"
LOCK, NEW, READY = ".lmppl.lock", ".lmppl.new", ".lmppl.ready"
# Without these files, other libraries find nothing to read. They are absent while the other files are being replaced.
MARKERS = ("adapter_config.json", "config.json")
TRIES = 100


@contextmanager
def writing(directory: str | os.PathLike[str], kind: str) -> Iterator[Path]:
    """Yields a folder to write into; at the end its files become, all at once, those of this kind in ``directory``.

    Earlier files of the kind are replaced or removed; all other files stay. After an error, the directory is unchanged.

    :param directory: where to save; it is created if it does not exist.
    :param kind: what is saved, such as "adapter".
    :raises ValueError: if a file of one of these names was not written by the package, or was changed since.
    :raises LockedError: if another process keeps writing there.

    >>> with writing("out", "adapter") as folder:
    ...     size = (folder / "adapter_config.json").write_text("{}")
    >>> sorted(manifest(Path("out")))
    ['adapter_config.json']
    """
    target = _directory(directory)
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    fresh = target / NEW
    try:
        with locked(target / LOCK):
            _finish(target)
            shutil.rmtree(fresh, ignore_errors=True)  # left by a writer that was killed
            fresh.mkdir()
            try:
                yield fresh
                _commit(target, kind, fresh)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
            _finish(target)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()
        raise


def claim(directory: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Raises ValueError if a file of one of these names exists and was not written by the package."""
    target = _directory(directory)
    if any((target / name).exists() for name in (READY, NEW, LOCK)):  # of a writer that was killed or still works
        with locked(target / LOCK):
            _finish(target)
            shutil.rmtree(target / NEW, ignore_errors=True)
    _refuse(target, names)


def _refuse(target: Path, names: Iterable[str]) -> None:
    known = manifest(target)
    for name in names:
        path = target / name
        if os.path.lexists(path) and not (name in known and _is(path, known[name]) or _is_figure(path)):
            raise ValueError(
                f"{path} was not written by lmppl, or was changed since, so it is not replaced; "
                "move it, or choose another directory"
            )


def read(directory: str | os.PathLike[str], load: Callable[[], T]) -> T:
    """Returns ``load()``, which reads files of one save; it is called again if another save replaced them meanwhile."""
    target = Path(directory).absolute()
    for attempt in range(TRIES):
        settle(target)
        before = _state(target)
        try:
            found = load()
        except Exception:
            if _state(target) == before or attempt == TRIES - 1:
                raise
        else:
            if _state(target) == before:
                return found
    raise ValueError(f"{target}: another process keeps writing here")


def _directory(path: str | os.PathLike[str]) -> Path:
    target = Path(path).absolute()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; a directory is needed")
    return target


def is_free(directory: Path) -> bool:
    """Returns whether a directory holds nothing except the remains of a save that was killed."""
    return directory.is_dir() and all(path.name.startswith(".lmppl.") for path in directory.iterdir())


def settle(directory: Path) -> None:
    """Finishes a save whose writer was killed after everything was written."""
    if (directory / READY).is_dir():
        try:
            with locked(directory / LOCK):
                _finish(directory)
        except PermissionError as error:
            raise ValueError(
                f"{directory}: a save was interrupted here; finishing it needs permission to write"
            ) from error


def verify(directory: Path, kind: str, ending: str = "") -> None:
    """Raises ValueError if a file of this kind, and with this ending, differs from what was saved.

    A directory without a manifest is not checked.
    """
    for name, entry in manifest(directory).items():
        if entry["kind"] == kind and name.endswith(ending) and not _is(directory / name, entry):
            raise ValueError(
                f"{directory / name} is missing, damaged or changed since it was saved"
                f" (if that is intended, remove {MANIFEST})"
            )


def manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Returns the kind, size and SHA-256 of each file in the directory that the package wrote, by name."""
    path = directory / MANIFEST
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, IsADirectoryError):
        found = None
    files = found.get("files") if isinstance(found, dict) and found.get("format") == FORMAT else None
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and e.keys() >= {"kind", "size", "sha256"} and Path(n).name == n for n, e in files.items()
    ):
        raise ValueError(f"{path} is damaged, or is not a manifest of lmppl ({FORMAT!r}); move it away")
    return files


def _commit(directory: Path, kind: str, fresh: Path) -> None:
    """Makes the files in ``fresh`` the valid ones of this kind."""
    names = sorted(path.name for path in fresh.iterdir())
    _refuse(directory, names)
    kept = {name: entry for name, entry in manifest(directory).items() if entry["kind"] != kind and name not in names}
    files = kept | {name: {"kind": kind, **_facts(fresh / name)} for name in names}
    (fresh / MANIFEST).write_text(json.dumps({"format": FORMAT, "save": uuid4().hex, "files": files}, indent=1))
    for name in (*names, MANIFEST):
        sync(fresh / name)
    sync(fresh)
    os.rename(fresh, directory / READY)
    sync(directory)


def _finish(directory: Path) -> None:
    """Moves the files of a committed save to their names; if it is killed, the next process goes on."""
    ready = directory / READY
    if not ready.is_dir():
        return
    names = {path.name for path in ready.iterdir()}
    if MANIFEST in names:
        markers = [name for name in MARKERS if name in names]
        before, after = manifest(directory), manifest(ready)
        for name in markers:
            (directory / name).unlink(missing_ok=True)
        for name in [*sorted(names - {*markers, MANIFEST}), *markers]:
            os.replace(ready / name, directory / name)
        for name in before.keys() - after.keys():
            if _is(directory / name, before[name]):
                (directory / name).unlink()
        sync(directory)
        os.replace(ready / MANIFEST, directory / MANIFEST)
    sync(directory)
    ready.rmdir()


def _state(directory: Path) -> tuple[object, ...]:
    """Returns a value that changes with every save, and while a save is being put in place."""
    try:
        return (directory / READY).is_dir(), (directory / MANIFEST).read_bytes()
    except OSError:
        return (directory / READY).is_dir(), None


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _is(path: Path, entry: dict[str, Any]) -> bool:
    """Returns whether a file is the one in the manifest."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size != entry["size"]:
        return False
    return bool(_facts(path)["sha256"] == entry["sha256"])


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- one file ----------------------------------------------------------------------------------------------------------

MARK = "lmppl figure"
_METADATA = {".png": "Software", ".pdf": "Creator", ".svg": "Creator", ".eps": "Creator"}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file to write that replaces ``path`` at the end; after an error, nothing is replaced."""
    path = path.absolute()
    fresh = path.with_name(f".{path.stem}.lmppl-new{path.suffix}")
    with locked(path.with_name(f".{path.name}.lmppl-lock")):
        try:
            yield fresh
            sync(fresh)
            os.replace(fresh, path)
            sync(path.parent)
        finally:
            fresh.unlink(missing_ok=True)


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file, whole or not at all."""
    with replacing(Path(path)) as fresh:
        fresh.write_bytes(content)


def new_figure(path: str | os.PathLike[str] | None, **options: Any) -> Any:
    """A matplotlib figure to be written to ``path``; with None one of pyplot, which a notebook shows."""
    if path is None:
        from matplotlib import pyplot

        return pyplot.figure(**options)
    from matplotlib.figure import Figure

    return Figure(**options)


def plain(label: str) -> str:
    """A label for matplotlib whose dollars start no formula."""
    return label.replace("$", r"\$")


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Saves a matplotlib figure, whole or not at all; as PNG if the name has no ending.

    :param figure: the figure.
    :param path: the file.
    :raises ValueError: if the file exists and is not a figure of lmppl.
    """
    path = Path(path)
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    key = _METADATA.get(path.suffix.lower())
    if path.exists() and not _is_figure(path):
        raise ValueError(
            f"path: {path} exists and is not a figure of lmppl, so it is not replaced; choose another file"
        )
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=120, **({"metadata": {key: MARK}} if key else {}))


def _is_figure(path: Path) -> bool:
    """Returns whether a file is a figure that the package wrote."""
    return path.suffix.lower() in _METADATA and path.is_file() and MARK.encode() in path.read_bytes()
