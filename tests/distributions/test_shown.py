"""What is shown of a completion: prompts and rules as strings, the network not asked."""

from __future__ import annotations

import torch
from html_tables import Page
from plate_of_three import P

from lmppl.distributions import Completion


def test_prompts_and_rules_are_shown_as_strings():
    before = P.tokens_scored
    d = Completion(
        P, ["a", "", "ba"] * 3, max_tokens=torch.arange(9), stop=["eos", "b"], temperature=0.5, allowed=[0, 2, 3]
    )
    assert repr(d) == (
        "Completion('a', '', 7 more, max_tokens=0 to 8, stop=<eos>, 'b', temperature=0.5, allowed=Tensor)"
    )
    page = Page(d._repr_html_())
    assert page.tables[0] == [["prompt"], ["a"], ["(empty)"], ["ba"], ["a"]] and "5 more prompts" in page.shown
    rules = dict(page.tables[1][1:])
    assert rules == {"max_tokens": "0 to 8", "stop": "<eos>, 'b'", "temperature": "0.5", "allowed": "Tensor"}
    assert "batch (9,)" in page.shown and P.tokens_scored == before


def test_one_prompt_without_a_stop():
    d = Completion(P, "ab", max_tokens=2, min_tokens=1, stop=None)
    assert repr(d) == "Completion('ab', max_tokens=2, stop=None, min_tokens=1)"
    assert repr(d.expand((3,))) == repr(d)
    assert ["ab"] in Page(d._repr_html_()).tables[0]


def test_long_prompts_are_cut():
    d = Completion(P, "a" * 50, max_tokens=2)
    assert repr(d).startswith("Completion('" + "a" * 39 + "…', ")
