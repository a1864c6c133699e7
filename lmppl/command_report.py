"""``report.html``: one self-contained page about a run."""

from __future__ import annotations

import base64
import json
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from . import command_record, command_results
from .catalogue import MODELS
from .command_options import Failure
from .files import manifest, read, writing

FILE = "report.html"
LONGEST = 2_000  # characters of a text that are shown
MOST_PICTURES = 1_000_000  # bytes; what does not fit is named
OWN = {"comparison.png", "budget.png", command_results.CURVE}  # drawn anew
INK = "#010203"  # what is drawn in this colour has that of the page's text, in light and dark


def write_report(directory: Path) -> Path:
    """Writes the page into the directory of a run, whole or not at all, and returns its path.

    :raises Failure: where there is no such directory, no run in it, or a file of it that cannot be read.
    """
    made = report(directory)
    with writing(directory, "report") as fresh:
        (fresh / FILE).write_text(made, encoding="utf-8")
    return directory / FILE


def report(directory: Path) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    found = _found(directory)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["shortened"] = lambda text: text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
    environment.filters["time"] = lambda iso: iso.replace("T", " ").replace("+00:00", " UTC")
    template = environment.from_string((files("lmppl") / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(found)


# -- what there is -----------------------------------------------------------------------------------------------------


def _found(directory: Path) -> dict[str, Any]:
    """What the page shows."""
    if not directory.is_dir():
        raise Failure(f"{directory}: there is no such directory; name what --out of train or compare named")
    commands = read(directory, lambda: command_record.commands(directory))
    compared = _json(directory / "comparison.json")
    histories = {name: h for name in ("", "wake-sleep", "ppo") if (h := _history(directory / name))}
    if not commands and compared is None and not histories:
        raise Failure(f"{directory}: there is no run of train or compare here; name what their --out named")
    pictures, left_out = _pictures(directory)
    found: dict[str, Any] = {"pictures": pictures, "left_out": left_out, "comparison": None, "trainings": []}
    with _of_this_version(directory / command_record.FILE, "record of a command"):
        found["commands"] = [_command(entry) for entry in reversed(commands)]
    with _of_this_version(directory / "comparison.json", "comparison"):
        found |= {} if compared is None else _comparison(compared)
    for name, history in histories.items():
        with _of_this_version(directory / name / "run.jsonl", "log of a training"):
            found["trainings"].append(_training(name, history))
    path = directory / command_results.SAMPLES[1]
    with _of_this_version(path, "samples"):
        found["samples"] = _samples(_json(path) or [])
    return found


@contextmanager
def _of_this_version(path: Path, what: str) -> Iterator[None]:
    """Raises Failure where a file is JSON, but not of the kind that the package writes."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise Failure(f"{path}: it is no {what} of this version ({error})") from None


def _command(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry of ``command.json``, with the page's texts about it."""
    from .inference.training.loop.cost import duration

    model = str(entry["settings"].get("model", ""))
    ended = entry["status"] == command_record.FINISHED
    said = {
        command_record.FINISHED: "finished",
        command_record.RUNNING: "unfinished: it is running, or was killed",
        command_record.INTERRUPTED: "unfinished: it was interrupted",
    }.get(entry["status"], entry["status"])
    shown = {name: dict(entry[name]) for name in ("settings", "versions", "results")}
    return (
        entry
        | shown
        | {
            "started": str(entry["started"]),
            "finished": entry["finished"] and str(entry["finished"]),
            "resumed": list(map(str, entry["resumed"])),
            "processes": int(entry["processes"]),
            "seed": entry["seed"],
            "title": f"lmppl {entry['command']} {model}",
            "infers": MODELS[model].infers if model in MODELS else "",
            "ended": ended,
            "said": said,
            "line": shlex.join(entry["argv"]),
            "took": duration(entry["seconds"]),
        }
    )


def _training(name: str, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the curves of a log, and the last evaluation of its guide."""
    from .inference.training.loop import verdict

    last: dict[str, Any] = next((step for step in reversed(history) if "held_out_ess" in step), {})
    limits = {
        "held_out_sd_u": ("sd(u), nats", "0 at the posterior"),
        "held_out_ess": ("ESS / N", f"1 at the posterior; less than {verdict.LEAST_ESS} is suspect"),
        "held_out_khat": ("k-hat", f"more than {verdict.MOST_KHAT} is suspect"),
        "held_out_impossible": ("impossible draws", f"more than {verdict.MOST_IMPOSSIBLE:.0%} is suspect"),
        "held_out_missed": ("missed by the guide", f"more than {verdict.MOST_MISSED:.0%} is suspect"),
        "held_out_lacking": ("given too little", f"more than {verdict.MOST_LACKING:.0%} is suspect"),
        "held_out_log_z": ("log evidence, by the guide's draws", "nats; too low on average"),
        "held_out_log_z_model": ("log evidence, by the model's draws", "nats; too low on average"),
        "held_out_log_z_above": ("log evidence, from above", "nats; too high on average"),
        "held_out_length": ("length of the texts", "tokens"),
        "held_out_stop": ("probability of stopping where texts stop", ""),
    }
    known = {key: float(last[key]) for key in limits if last.get(key) is not None}
    return {
        "name": name,
        "steps": history[-1]["step"] + 1,
        "curves": _svg(lambda: command_results.training_figure(history)),
        "look": last.get("step", -1) + 1,
        "verdict": str(last.get("verdict") or ""),
        "reasons": verdict.reasons(known),
        "figures": [(title, known[key], meaning) for key, (title, meaning) in limits.items() if key in known],
    }


def _comparison(found: Any) -> dict[str, Any]:
    """Returns tables, notes and plots of a saved comparison, without infinite figures, which JSON cannot hold."""
    from .inference.judging.comparison import Comparison, Point, Row

    rows, curves = [Row(**row) for row in found["rows"]], [Point(**point) for point in found["curves"]]
    saved = Comparison(rows, found["unexplored"], list(found["notes"]), curves, found["unit"])
    return {
        "comparison": {"tables": saved.cells(), "notes": saved.notes},
        "bars": _svg_of(saved.plot),
        "budget": _svg_of(saved.plot_budget) if any(map(_is_drawn, curves)) else None,
    }


def _is_drawn(point: Any) -> bool:
    return point.draws_tv is not None or point.log_evidence_error is not None


def _samples(found: Any) -> list[dict[str, Any]]:
    return [
        {
            "observation": str(one["observation"]),
            "texts": [
                {
                    "text": str(row["text"]),
                    "probability": float(row["probability"]),
                    "exact": None if row["exact"] is None else float(row["exact"]),
                }
                for row in one["texts"]
            ],
        }
        for one in found
    ]


def _json(path: Path) -> Any:
    """Returns the contents of a file; None if it does not exist."""
    try:
        return read(path.parent, lambda: json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path}: it is no JSON ({error})") from None


def _history(directory: Path) -> list[dict[str, Any]]:
    """Returns the log of a training; empty if there is none."""
    try:
        return command_results.history_of(directory)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise Failure(f"{directory / 'run.jsonl'}: it is no log of a training ({error})") from None


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(directory: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns the model's own pictures as (name, data URI), and the names of those that are too large."""
    found, left_out, size = [], [], 0
    for name in sorted(manifest(directory)):
        path = directory / name
        if name.endswith(".png") and name not in OWN and path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            if size + len(content) > MOST_PICTURES:
                left_out.append(name)
                continue
            size += len(content)
            found.append((name, f"data:image/png;base64,{base64.b64encode(content).decode()}"))
    return found, left_out


def _svg_of(plot: Callable[[Path], object]) -> str:
    """Returns the SVG that a method writes to a file."""
    with tempfile.TemporaryDirectory() as folder, _on_any_page():
        path = Path(folder) / "figure.svg"
        plot(path)
        return _inline(path.read_text(encoding="utf-8"))


def _svg(draw: Callable[[], Any]) -> str:
    """A figure."""
    from .files import save_figure

    return _svg_of(lambda path: save_figure(draw(), path))


@contextmanager
def _on_any_page() -> Iterator[None]:
    """A context for figures without background, whose texts are texts in the page's own colour."""
    from matplotlib import rc_context

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    clear = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    with rc_context({name: INK for name in ink} | {name: "none" for name in clear} | {"svg.fonttype": "none"}):
        yield


def _inline(svg: str) -> Any:
    """Returns an SVG file as an element of the page, without prologue, metadata and identifiers that could repeat."""
    from markupsafe import Markup

    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return Markup(re.sub(r'<g id="[^"]*"', "<g", svg).replace(INK, "currentColor"))
