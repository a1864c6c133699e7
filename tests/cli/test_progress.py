"""Progress: figures, rate and time left, as a bar on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import math
import os
import re
import select
import sys

import pytest

from lmppl.inference.training.loop.loop import figures
from lmppl.progress import EVERY, Lines, progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(capsys, total: int, seconds: float, done: int = 0, stop: int | None = None) -> list[str]:
    """What is said of steps that take so long each."""
    clock = Clock()
    said = Lines("GFlowNet", total, done, "step", clock)
    for step in range(done, stop or total):
        clock.now += seconds
        said.update(f"loss {step}")
    said.close()
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_a_line_has_what_is_done_the_mean_rate_and_the_time_left(capsys):
    first, *_, last = lines_of(capsys, 1000, 0.5)
    # 20 steps in 10 seconds are 2 a second; 980 more take 490 seconds
    assert first == "GFlowNet: 20/1000 [00:10<08:10,  2.00step/s, loss 19]"
    assert last == "GFlowNet: 1000/1000 [08:20<00:00,  2.00step/s, loss 999]"


def test_a_run_that_is_taken_up_counts_its_own_steps_for_the_rate(capsys):
    first = lines_of(capsys, 1000, 4.0, done=400)[0]
    # 3 steps in 12 seconds; 597 more take 2388 seconds, and not what 403 steps in 12 seconds would suggest
    assert first == "GFlowNet: 403/1000 [00:12<39:48,  4.00s/step, loss 402]"


def test_lines_are_ten_seconds_apart_and_the_last_one_is_said_once(capsys):
    assert EVERY == 10.0
    said = lines_of(capsys, 100, 0.4)  # 40 seconds
    assert [line.split()[1] for line in said] == ["25/100", "50/100", "75/100", "100/100"]
    assert len(lines_of(capsys, 5, 0.1)) == 1
    assert [line.split()[1] for line in lines_of(capsys, 100, 0.4, stop=30)] == ["25/100", "30/100"]  # stopped early
    assert lines_of(capsys, 5, 0.1, done=5) == []  # nothing was left to do


def test_without_a_terminal_there_are_no_control_characters(capsys):
    with progress("Training", 3) as told:
        for _ in range(3):
            told.update("loss 1.0")
        told.say("a line")
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"a line\nTraining: 3/3 \[[^\n]*step/s, loss 1.0\]\n", err), err
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", err)


def test_nothing_is_said_where_nobody_wants_it(capsys):
    with progress("Training", 1, shown=False) as told:
        told.update("loss 1.0")
        told.say("a line")
    assert capsys.readouterr() == ("", "")


def on_a_terminal(monkeypatch, columns: int) -> str:
    """What a terminal gets."""
    termios = pytest.importorskip("termios")
    outer, inner = os.openpty()
    termios.tcsetwinsize(inner, (24, columns))
    with open(inner, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with progress("Training", 4, done=1) as told:
            for _ in range(3):
                told.update("loss 0.250")
            told.say("a line")
        shown = b""
        while select.select([outer], [], [], 0)[0]:
            shown += os.read(outer, 100_000)
    os.close(outer)
    return shown.decode()


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    shown = on_a_terminal(monkeypatch, columns=100)
    assert "\r" in shown and "a line" in shown
    last = shown.replace("\n", "\r").rstrip("\r").split("\r")[-1]
    assert re.match(r"Training: 100%\|█+\| 4/4 \[00:00<00:00, .*step/s, loss 0.250\]", last), shown


def test_on_a_terminal_without_columns_there_are_lines(monkeypatch):
    first, last = on_a_terminal(monkeypatch, columns=0).splitlines()
    assert first == "a line" and re.fullmatch(r"Training: 4/4 \[.*step/s, loss 0.250\]", last)


def test_the_figures_are_the_loss_and_what_is_named_next():
    metrics = {"loss": 0.5, "grad_norm": 3.0, "sd_u": 0.25, "impossible": 0.0, "note": "text"}
    assert figures(metrics) == "loss 0.500, sd_u 0.250"
    assert figures({"loss": math.nan, "skipped": 1.0}) == "loss nan"
