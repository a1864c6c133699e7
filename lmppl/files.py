"""Saving into a directory: the files of one save become visible together, and nothing of anybody else's is touched.

A save is written into a hidden folder of the directory, which is renamed when all of it is on the disk: from then on it
is the one that counts, whatever happens.  Its files are moved to their names afterwards, by whoever comes next if the
writer was killed.  A manifest names what the package wrote, with sizes and hashes: nothing else is ever replaced.
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
# Without these, readers that know of no manifest find nothing; they are away while others are being replaced.
MARKERS = ("adapter_config.json", "config.json")
TRIES = 100


@contextmanager
def writing(directory: str | os.PathLike[str], kind: str) -> Iterator[Path]:
    """A folder to write files into; at the end they are, all at once, the files of this kind in ``directory``.

    Earlier files of the kind are replaced or removed, everything else stays; after an error all is as before.

    :raises ValueError: where a file of these names was not written by the package, or was changed since.
    :raises LockedError: where another process writes there all the time.

    >>> with writing("out", "adapter") as folder:
    ...     (folder / "adapter_config.json").write_text(config)
    """
    target = _directory(directory)
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    fresh = target / NEW
    try:
        with locked(target / LOCK):
            _finish(target)
            shutil.rmtree(fresh, ignore_errors=True)  # of a writer that was killed
            fresh.mkdir()
            try:
                yield fresh
                _commit(target, kind, fresh)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
            _finish(target)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def claim(directory: str | os.PathLike[str], names: Iterable[str]) -> None:
    """See to it that files of these names can be written: ValueError where one is there that somebody else wrote."""
    target = _directory(directory)
    if any((target / name).exists() for name in (READY, NEW, LOCK)):  # of a writer that was killed, or of one at work
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
                f"{path} was not written by lmppl, or was changed since: it is not replaced; "
                "move it, or name another directory"
            )


def read(directory: str | os.PathLike[str], load: Callable[[], T]) -> T:
    """``load()``, whose files are those of one save: again where another was put in their place meanwhile."""
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
    raise ValueError(f"{target} is being written all the time")


def _directory(path: str | os.PathLike[str]) -> Path:
    target = Path(path).absolute()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; name a directory")
    return target


def is_free(directory: Path) -> bool:
    """Whether there is nothing but what a save that was killed has left."""
    return directory.is_dir() and all(path.name.startswith(".lmppl.") for path in directory.iterdir())


def settle(directory: Path) -> None:
    """Finish a save whose writer was killed when all of it was written."""
    if (directory / READY).is_dir():
        try:
            with locked(directory / LOCK):
                _finish(directory)
        except PermissionError as error:
            raise ValueError(f"{directory}: a save was cut off here; it is finished where it can be written") from error


def verify(directory: Path, kind: str, ending: str = "") -> None:
    """ValueError where a file of this kind, and with this ending, is not as it was saved.

    A directory without a manifest is not looked at.
    """
    for name, entry in manifest(directory).items():
        if entry["kind"] == kind and name.endswith(ending) and not _is(directory / name, entry):
            raise ValueError(
                f"{directory / name} is missing, damaged or changed since it was saved"
                f" (where that is meant, remove {MANIFEST})"
            )


def manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Of each file in the directory that the package wrote: its kind, size and SHA-256."""
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
        raise ValueError(f"{path} is damaged, or no manifest of lmppl ({FORMAT!r}); move it away")
    return files


def _commit(directory: Path, kind: str, fresh: Path) -> None:
    """The moment from which on the files in ``fresh`` are those of this kind."""
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
    """Move the files of a committed save to their names; whoever is killed on the way leaves the rest to the next."""
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
    """What is another after every save, and while one is being put in place."""
    try:
        return (directory / READY).is_dir(), (directory / MANIFEST).read_bytes()
    except OSError:
        return (directory / READY).is_dir(), None


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _is(path: Path, entry: dict[str, Any]) -> bool:
    """Whether the file is the one that the manifest speaks of."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size != entry["size"]:
        return False
    return bool(_facts(path)["sha256"] == entry["sha256"])


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
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
    """A file to write that takes the place of ``path`` at the end, or of nothing after an error."""
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
    """Write a file, whole or not at all."""
    with replacing(Path(path)) as fresh:
        fresh.write_bytes(content)


def new_figure(path: str | os.PathLike[str] | None, **options: Any) -> Any:
    """A matplotlib figure to be written to ``path``; with None one of pyplot, which a notebook shows."""
    if path is None:
        from matplotlib import pyplot

        return pyplot.figure(**options)
    from matplotlib.figure import Figure

    return Figure(**options)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a matplotlib figure, a PNG where its name has no ending, whole or not at all.

    :raises ValueError: where another file than a figure of lmppl is there.
    """
    path = Path(path)
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    key = _METADATA.get(path.suffix.lower())
    if path.exists() and not _is_figure(path):
        raise ValueError(f"path: {path} is there and is no figure of lmppl: it is not replaced; name another file")
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=120, **({"metadata": {key: MARK}} if key else {}))


def _is_figure(path: Path) -> bool:
    """Whether it is a figure that the package wrote."""
    return path.suffix.lower() in _METADATA and path.is_file() and MARK.encode() in path.read_bytes()
