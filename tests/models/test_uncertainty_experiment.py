"""The experiment `uncertainty`: its members, and what it tells and shows of their answers."""

from __future__ import annotations

import math

import pytest
import torch

from lmppl import embedded
from lmppl.inference import Ensemble, Prediction
from lmppl.models import EXPERIMENTS, uncertainty


def answers(*members):
    """An ensemble of p(second answer) by sentence, a particle a member."""
    made = []
    for p in members:
        second = torch.tensor([p], dtype=torch.float64)
        log_p = torch.stack([1 - second, second]).log()
        made.append(Prediction(["a", "b"], log_p, torch.zeros_like(second)))
    return Ensemble.of(made)


def test_what_is_told_is_by_hand():
    """Two members that agree on two sentences and disagree on the third, which is wrong."""
    found, y = answers([0.9, 0.2, 0.95], [0.9, 0.2, 0.15]), torch.tensor([1, 0, 0])

    def entropy(p):
        return -(p * math.log(p) + (1 - p) * math.log(1 - p))

    first, _, entropies, expected, chains, parameters = uncertainty.told(found, y, 10).splitlines()
    assert "2 adapters, 10 labels each, to 3 unseen sentences: 66.7% right" in first
    right = (entropy(0.9) + entropy(0.2)) / 2
    inner = (entropy(0.95) + entropy(0.15)) / 2
    assert entropies.split()[1:] == [f"{right:.3f}", f"{entropy(0.55):.3f}", "1.00"]
    assert expected.split()[2:] == [f"{right:.3f}", f"{inner:.3f}", "0.00"]  # it is surest of the wrong one
    assert [float(v) for v in chains.split()[2:4]] == pytest.approx([0, 0], abs=1e-3)
    assert parameters.split()[2:] == ["0.000", f"{entropy(0.55) - inner:.3f}", "1.00"]
    assert "–" in uncertainty.told(answers([0.9], [0.8]), torch.tensor([1]), 1)  # nothing is wrong: no AUROC


def test_members_learn_their_labels_and_differ(tmp_path):
    e = EXPERIMENTS["uncertainty"](count=4, members=2)
    labelled = embedded.data("subjectivity", "train")[:4]
    before = e.model.__self__
    tasks = [uncertainty.member(e.lm, labelled, seed, 6) for seed in (0, 1)]
    x, y = before.encode(labelled)
    with torch.no_grad():
        fits = [float(task.log_likelihood(x, y).mean()) for task in (before, *tasks)]
    assert min(fits[1:]) > fits[0] + 0.05 and fits[1] != fits[2]
    unseen = tasks[0].encode(embedded.data("subjectivity", "test")[:20])
    found = Ensemble.of([task.predict(unseen[0]) for task in tasks])
    uncertainty.plot(found, unseen[1], tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("given", "said"),
    [({"members": 1}, "members"), ({"count": 0}, "count"), ({"data": "x.jsonl"}, "data")],
)
def test_what_it_cannot_do_is_named(given, said):
    with pytest.raises(ValueError, match=said):
        EXPERIMENTS["uncertainty"](**given)
