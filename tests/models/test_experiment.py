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
