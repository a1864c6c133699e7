"""Direct preference optimisation: its gradient by hand, its optimum, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from four_texts import One, gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Law, Plain, tokens
from tasks import Task
from tiny import tiny_lm

from lmppl.inference import DirectPreferenceOptimization, SiteMismatch

number = st.floats(-2.0, 2.0, allow_nan=False)
VOCAB = 4


def of(one: One, *rows: int) -> tuple:
    """A batch: for as many pairs as there are, what was chosen and what was not, by their rows of the four texts."""
    chosen, rejected = rows[::2], rows[1::2]
    return one.y.repeat(len(chosen), 1), {"z": one.support[[*chosen]]}, {"z": one.support[[*rejected]]}


@settings(max_examples=25, deadline=None)
@given(st.lists(number, min_size=4, max_size=4), st.integers(0, 3), st.integers(0, 3), st.floats(0.05, 3.0))
def test_loss_and_gradient_are_the_formula(row, chosen, rejected, beta):
    """-log s(m), and -beta s(-m) (1[chosen] - 1[rejected]) of the guide's logits: log q's normaliser cancels."""
    one = One(tiny_lm(vocab=VOCAB, dtype=torch.float64), torch.tensor(row, dtype=torch.float64))
    log_q, log_p = [x.log_softmax(-1).tolist() for x in (torch.tensor(row, dtype=torch.float64), one.log_prior)]
    margin = beta * ((log_q[chosen] - log_p[chosen]) - (log_q[rejected] - log_p[rejected]))
    trainer = one.still(DirectPreferenceOptimization, beta=beta)
    found = trainer.step(*of(one, chosen, rejected))
    assert found["loss"] == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-9)
    assert found["margin"] == pytest.approx(margin, abs=1e-9) and found["accuracy"] == float(margin > 0)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[chosen] -= beta / (1 + math.exp(margin))
    expected[rejected] += beta / (1 + math.exp(margin))
    assert (one.logits.grad[one.row(one.y)[0]] - expected).abs().max() < 1e-9


@settings(max_examples=10, deadline=None)
@given(st.lists(number, min_size=4, max_size=4), st.floats(0.3, 3.0))
def test_its_optimum_is_the_tilted_reference(utility, beta):
    """All choices of one Bradley-Terry utility r, each as often as it is made: no gradient at q = p e^(r / beta)."""
    lm = tiny_lm(vocab=VOCAB, dtype=torch.float64)
    best = One(lm).log_prior + torch.tensor(utility, dtype=torch.float64) / beta
    for logits, still in ((best, True), (best + torch.tensor([0.5, 0, 0, 0]), False)):
        one = One(lm, logits)
        trainer = one.still(DirectPreferenceOptimization, beta=beta)
        total = torch.zeros_like(one.logits)
        for a in range(4):
            for b in range(4):
                often = 1 / (1 + math.exp(utility[b] - utility[a]))
                total += often * gradient(trainer, [one.logits], *of(one, a, b))[0]
        assert (total.abs().max() < 1e-9) == still


def test_training_reaches_it():
    """All pairs as often as they are made, in hundredths: from a TV of 0.3 and more to below 0.02."""
    one, r = One(tiny_lm(vocab=VOCAB, dtype=torch.float64)), [1.0, -0.5, 0.0, 0.4]
    target = (one.log_prior + torch.tensor(r, dtype=torch.float64) / 0.5).softmax(-1)
    pairs = [(a, b) for a in range(4) for b in range(4) for _ in range(round(100 / (1 + math.exp(r[b] - r[a]))))]

    def tv():
        return float((one.logits.detach()[one.row(one.y)[0]].softmax(-1) - target).abs().sum() / 2)

    before = tv()
    trainer = one.trainer(DirectPreferenceOptimization, beta=0.5)
    trainer.fit([of(one, *(i for pair in pairs for i in pair))], 150, progress=False)
    assert before > 0.3 and tv() < 0.02


def test_the_reference_is_the_model_without_what_it_observes():
    """An adapter against plain loops over tokens; each observation has its own pair."""
    task = Task()
    chosen, rejected = (task.lm.encode(texts, stop="eos") for texts in (["b", "ab"], ["cc", ""]))
    q, p = Plain(task.q), Plain(task.lm)
    losses = []
    for i, (x, y) in enumerate(zip(*task.args, strict=True)):
        guide, prior = (
            Law(plain, tokens(prompt), 2) for plain, prompt in ((q, task.q.join(y[None], x[None])[0]), (p, x))
        )
        best, other = (guide.log_prob(tokens(z[i])) - prior.log_prob(tokens(z[i])) for z in (chosen, rejected))
        losses.append(math.log1p(math.exp(-0.7 * (best - other))))
    trainer = task.trainer(DirectPreferenceOptimization, beta=0.7)
    before = task.values()
    assert trainer.step(*task.args, {"z": chosen}, {"z": rejected})["loss"] == pytest.approx(sum(losses) / 2, abs=1e-9)
    assert any((a != b).any() for a, b in zip(before, task.values(), strict=True))


def test_what_is_no_choice_is_refused():
    task = Task()
    trainer = task.trainer(DirectPreferenceOptimization)
    z = {"z": task.lm.encode(["b", "ab"], stop="eos")}
    with pytest.raises(ValueError, match="last two items"):
        trainer.step(*task.args, z)
    for values, name in (({}, "'z'"), (z | {"w": z["z"]}, "'w'")):
        with pytest.raises(SiteMismatch, match=name):
            trainer.step(*task.args, z, values)
    with pytest.raises(ValueError, match="impossible under the"):
        trainer.step(*task.args, z, {"z": task.lm.encode(["abc", "a"], stop="eos")})
    for beta in (0.0, -1.0, math.inf, math.nan, True):
        with pytest.raises(ValueError, match="beta"):
            task.trainer(DirectPreferenceOptimization, beta=beta)
