"""Shapes: torch's own answer, and its own error."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lmppl.shapes import broadcast_shapes

SHAPES = st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 3]), max_size=4), max_size=4)


@given(SHAPES)
def test_shapes_are_those_of_torch(shapes):
    answers = []
    for broadcast in (broadcast_shapes, torch.broadcast_shapes):
        try:
            answers.append(broadcast(*shapes))
        except RuntimeError as error:
            answers.append(str(error))
    assert answers[0] == answers[1] and type(answers[0]) is type(answers[1])


def test_more_axes_than_numpy_has():
    assert broadcast_shapes([1] * 70, (2,)) == torch.Size([1] * 69 + [2])
