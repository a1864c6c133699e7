"""Savers that are killed before each of their system calls, are told to end, or write at once.

Argument: a directory to work in. Prints, as JSON, what was found after each.
"""

from __future__ import annotations

import builtins
import io
import itertools
import json
import os
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pyro
import pyro.distributions as dist
import torch
import transformers
from safetensors.torch import load_file
from tiny import flat_lm

from lmppl import LanguageModel
from lmppl.inference import Importance, Posterior, Trainer
from lmppl.inference.core.query import Query
from lmppl.inference.training.loop import checkpoint

CALLS = {
    os: ["replace", "rename", "fsync", "mkdir", "rmdir", "unlink", "open", "truncate", "ftruncate", "write"],
    builtins: ["open"],
    io: ["open"],
}
OUT = Path(sys.argv[1])
LORA = {"r": 2, "target_modules": "all-linear"}


def die_before(number: int) -> None:
    """Let the process end, as if it were killed, before its ``number``-th system call."""
    count = itertools.count(1)

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(count) == number:
                os._exit(9)
            return call(*args, **kwargs)

        return counted

    for module, names in CALLS.items():
        for name in names:
            setattr(module, name, wrapped(getattr(module, name)))


def child(action: Callable[[], Any]) -> int:
    process = os.fork()
    if not process:
        try:
            action()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    return process


def status(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def killed(kind: str, save: Callable[[str, Path], Any], load: Callable[[Path], str], check: Any = None) -> None:
    """Save "new" over "old", killed before call 1, 2, ..: what is there then, and after the next save."""
    before, there = OUT / f"{kind}-old", OUT / kind
    save("old", before)
    (before / "thesis.txt").write_text("years of work")
    found: Counter[str] = Counter()
    for number in itertools.count(1):
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(before, there)

        def action(number: int = number) -> None:
            die_before(number)
            save("new", there)

        code = status(child(action))
        if check is not None:
            found[check(there)] += 1
        found[load(there)] += 1
        if code == 0:
            break
        save("new", there)
        assert load(there) == "new" and (there / "thesis.txt").read_text() == "years of work"
        assert set(names(there)) == set(names(before)), names(there)
    shutil.rmtree(there)
    for number in range(1, 40):  # where nothing was before

        def first(number: int = number) -> None:
            die_before(number)
            save("new", there / "below")

        if status(child(first)) == 0:
            break
        try:
            found[f"first {load(there / 'below')}"] += 1
        except (ValueError, OSError):
            found["first nothing"] += 1
        save("new", there / "below")
        assert load(there / "below") == "new" and [*there.iterdir()] == [there / "below"]
        shutil.rmtree(there)
    print(json.dumps([kind, {"calls": number, **found}]))


# -- what is saved -----------------------------------------------------------------------------------------------------

lm = flat_lm()


def view(which: str) -> LanguageModel:
    made = lm.with_adapter(peft.LoraConfig(lora_alpha=4 if which == "old" else 64, **LORA))
    for p in made.trainable_parameters():
        torch.nn.init.constant_(p, 0.1 if which == "old" else 0.2)
    return made


def one(found: set[str]) -> str:
    return "mixed" if len(found) > 1 else found.pop()


def adapter(path: Path) -> str:
    loaded = lm.with_adapter(path)
    alpha = loaded._adapter.config.lora_alpha
    weights = {"old" if p.flatten()[0] < 0.15 else "new" for p in loaded.trainable_parameters()}
    return one(weights | {"old" if alpha == 4 else "new"})


def as_peft_reads(path: Path) -> str:
    if not (path / "adapter_config.json").exists():
        return "peft sees nothing"
    alpha = json.loads((path / "adapter_config.json").read_text())["lora_alpha"]
    weights = next(iter(load_file(path / "adapter_model.safetensors").values()))
    return "peft sees " + one({"old" if alpha == 4 else "new", "old" if weights.flatten()[0] < 0.15 else "new"})


bases = {"old": flat_lm(seed=1), "new": flat_lm(seed=2)}


def base(path: Path) -> str:
    weight = LanguageModel.from_pretrained(path).network.base_parameters[0]
    return next(name for name, b in bases.items() if torch.equal(b.network.base_parameters[0], weight))


def model(*args: Any) -> None:
    pyro.sample("k", dist.Normal(0.0, 1.0))


posteriors = {"old": Importance(model, num_particles=3).run(), "new": Importance(model, num_particles=5).run()}


def posterior(path: Path) -> str:
    return "old" if Posterior.load(path).num_particles == 3 else "new"


def optimizer(value: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.full((4,), value))], lr=value)


def save_checkpoint(which: str, path: Path) -> None:
    checkpoint.save(path, optimizer(1.0 if which == "old" else 2.0), 1 if which == "old" else 2, {})


def training(path: Path) -> str:
    found = optimizer(0.0)
    state, _ = checkpoint.load(path, found)
    (group,) = found.param_groups
    return one({"old" if x == 1 else "new" for x in (state["step"], group["lr"], group["params"][0][0].item())})


# -- training ----------------------------------------------------------------------------------------------------------


class Walk(Trainer):
    """A parameter that draws its steps."""

    def update(self, query: Query, step: int) -> dict[str, float]:
        (p,) = self.parameters
        p.grad = torch.randn(2) + sum(query.args)
        self.optimizer.step()
        return {"loss": p.detach().sum().item()}


def walk(path: Path, steps: int = 4, **kwargs: Any) -> list[float]:
    p = torch.nn.Parameter(torch.zeros(2))
    files = {"log": path / "c" / "run.jsonl", "checkpoint": path / "c", "checkpoint_every": 2, "progress": False}
    batches = [(1.0,), (2.0,)]
    Walk(model, model, optimizer=torch.optim.Adam([p])).fit(batches, steps, warmup=0, **files, **kwargs)
    return p.tolist()


def trained() -> None:
    """A run that is killed before each call, and taken up by the next: it ends where one ends that was left alone."""
    expected = walk(OUT / "whole")
    lines = (OUT / "whole" / "c" / "run.jsonl").read_text()
    listed = names(OUT / "whole")
    ends: Counter[str] = Counter()
    for number in itertools.count(1):
        shutil.rmtree(OUT / "walk", ignore_errors=True)

        def run(number: int = number) -> None:
            die_before(number)
            walk(OUT / "walk")

        code = status(child(run))
        for _ in range(2):  # and the next is killed too, a little later
            status(child(lambda number=number: (die_before(number % 60 + 1), walk(OUT / "walk"))))
        log = OUT / "walk" / "c" / "run.jsonl"
        if log.exists() and number % 2:
            with log.open("a") as file:
                file.write('{"step": 3, "lo')  # as after a cut in the middle of a line
        assert walk(OUT / "walk") == expected and log.read_text() == lines, (number, log.read_text())
        assert names(OUT / "walk") == listed, (number, names(OUT / "walk"))
        ends["killed" if code else "whole"] += 1
        if not code:
            break
    print(json.dumps(["training", ends]))
    for name, number in {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.items():
        shutil.rmtree(OUT / "walk")
        where = OUT / "walk" / "c" / "training.json"

        def told(step: int, metrics: dict[str, float], number: int = number) -> None:
            if step == 2:
                os.kill(os.getpid(), number)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process may have been told to ignore it
        code = status(child(lambda told=told: walk(OUT / "walk", callback=told)))
        step = json.loads(where.read_text())["step"]
        print(json.dumps([name, [code, step, walk(OUT / "walk") == expected]]))


def at_once() -> None:
    """Two processes save to one directory while a third reads it: all of them what they should."""
    there = OUT / "once"
    save_checkpoint("old", there)

    def saver() -> None:
        for i in range(60):
            save_checkpoint("old" if i % 2 else "new", there)

    savers = [child(saver), child(saver)]
    seen: Counter[str] = Counter()
    running = True
    while running:
        running = os.waitpid(savers[0], os.WNOHANG)[0] == 0
        seen[training(there)] += 1
    print(json.dumps(["at once", [status(savers[1]), "mixed" in seen, names(there)]]))


warnings.simplefilter("error")
transformers.logging.disable_progress_bar()
PARTS: dict[str, Callable[[], None]] = {
    "adapter": lambda: killed("adapter", lambda which, path: view(which).save_pretrained(path), adapter, as_peft_reads),
    "base": lambda: killed("base", lambda which, path: bases[which].save_pretrained(path), base),
    "posterior": lambda: killed("posterior", lambda which, path: posteriors[which].save(path), posterior),
    "checkpoint": lambda: killed("checkpoint", save_checkpoint, training),
    "training": trained,
    "at once": at_once,
}
for part in sys.argv[2:] or PARTS:
    PARTS[part]()
