"""What all experiments have in common."""

from __future__ import annotations

import pytest

from lmppl.catalogue import MODELS
from lmppl.models import EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_option_that_is_none_is_refused_by_name(name):
    with pytest.raises(TypeError, match=r"experiment\(\) got an unexpected keyword argument .sead."):
        EXPERIMENTS[name](sead=1)
    with pytest.raises(ValueError, match="setting: expected one of 'posterior', 'paper', got 'posteriori'"):
        EXPERIMENTS[name](setting="posteriori")
    with pytest.raises(ValueError, match=f"lm: expected a {MODELS[name].lm}, got 'x'"):
        EXPERIMENTS[name](lm="x")


@pytest.mark.parametrize("longest", [1, 0])
@pytest.mark.parametrize("name", ["continuation", "contrastive", "preferences", "transfer"])
def test_max_tokens_is_what_was_asked_for_even_if_nothing_is_left(name, longest):
    assert EXPERIMENTS[name](max_tokens=longest).model.__self__.max_tokens == longest


def test_max_tokens_is_not_ignored_on_embedded_prompts():
    with pytest.raises(ValueError, match="max_tokens: it is for prompts of your own"):
        EXPERIMENTS["constrained"](max_tokens=3)
