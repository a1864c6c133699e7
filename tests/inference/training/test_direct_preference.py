"""Direct preference optimisation: its gradient by hand, its optimum, and what it refuses."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from four_texts import One, gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Law, Plain, tokens
from tasks import Task
from tiny import tiny_lm

from lmppl.distributions import Completion
from lmppl.inference import DirectPreferenceOptimization, SiteMismatch, SupervisedFineTuning

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


class Numbers:
    """Four numbers around 10 i and, under the guide, around i; the plate may have two of them."""

    def __init__(self) -> None:
        self.loc = torch.nn.Parameter(torch.arange(4.0, dtype=torch.float64))

    def model(self, outside=False, **which):
        if outside:
            pyro.factor("outside", torch.tensor(1.0))
        with pyro.plate("data", 4, **which) as i:
            pyro.sample("z", dist.Normal(10 * i.double(), 1.0))

    def guide(self, outside=False, **which):
        with pyro.plate("data", 4, **which) as i:
            pyro.sample("z", dist.Normal(self.loc[i], 1.0))

    def loss(self, chosen, rejected, **kwargs) -> float:
        optimizer = torch.optim.SGD([self.loc], lr=1e-12)
        trainer = DirectPreferenceOptimization(self.model, self.guide, optimizer=optimizer, beta=1.0)
        return trainer.step({"z": chosen}, {"z": rejected}, **kwargs)["loss"]


def test_choices_go_with_the_observations_that_they_are_of():
    """A plate that draws which it has is refused, for supervision too; one that is told them is by hand."""
    numbers, indices = Numbers(), torch.tensor([1, 3])
    a, b = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, 2.5]).double()
    margin = [
        sum(sign * ((z - 10 * i) ** 2 - (z - i) ** 2) / 2 for sign, z in ((1, x), (-1, y)))
        for i, x, y in zip((1, 3), a.tolist(), b.tolist(), strict=True)
    ]
    expected = sum(math.log1p(math.exp(-m)) for m in margin) / 2
    assert numbers.loss(a, b, subsample=indices) == pytest.approx(expected)
    with pytest.raises(ValueError, match="plate 'data' subsamples its observations"):
        numbers.loss(a, b, subsample_size=2)
    tuning = SupervisedFineTuning(numbers.model, numbers.guide, optimizer=torch.optim.SGD([numbers.loc], lr=0.1))
    with pytest.raises(ValueError, match="plate 'data' subsamples its observations"):
        tuning.step({"z": a}, subsample_size=2)


def test_without_a_kept_plate_a_choice_is_of_all_together():
    numbers = Numbers()
    a, b = torch.tensor([0.1, 0.2, 0.0, 0.3]).double(), torch.tensor([0.0, 0.1, 0.1, 0.2]).double()
    i = torch.arange(4.0, dtype=torch.float64)
    margin = sum(sign * ((z - 10 * i) ** 2 - (z - i) ** 2) / 2 for sign, z in ((1, a), (-1, b)))
    assert numbers.loss(a, b) == pytest.approx(torch.nn.functional.softplus(-margin).mean().item())
    together = torch.nn.functional.softplus(-margin.sum()).item()
    assert numbers.loss(a, b, outside=True) == pytest.approx(together) != numbers.loss(a, b)


def test_a_choice_between_values_of_several_latents():
    """A category that a text depends on: their log-ratios add up."""
    task, loc = Task(), torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))

    def program(x, lm, logits):
        with pyro.plate("stories", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=logits))
            pyro.sample("z", Completion(lm, x, max_tokens=2, temperature=1.0 + k))

    x, _ = task.args
    chosen = {"k": torch.tensor([0, 2]), "z": task.lm.encode(["b", "ab"], stop="eos")}
    rejected = {"k": torch.tensor([1, 1]), "z": task.lm.encode(["cc", ""], stop="eos")}
    q, p = Plain(task.q), Plain(task.lm)
    losses = []
    for i in range(2):
        ratios = []
        for values in (chosen, rejected):
            k, z, prompt = int(values["k"][i]), tokens(values["z"][i]), tokens(x[i])
            texts = [Law(plain, prompt, 2, temperature=1.0 + k).log_prob(z) for plain in (q, p)]
            ratios.append(float(loc.detach().log_softmax(-1)[k]) + math.log(3) + texts[0] - texts[1])
        losses.append(math.log1p(math.exp(-0.7 * (ratios[0] - ratios[1]))))
    trainer = DirectPreferenceOptimization(
        lambda x: program(x, task.lm, torch.zeros(3, dtype=torch.float64)),
        lambda x: program(x, task.q, loc),
        optimizer=torch.optim.SGD([loc, *task.q.trainable_parameters()], lr=1e-12),
        beta=0.7,
    )
    assert trainer.step(x, chosen, rejected)["loss"] == pytest.approx(sum(losses) / 2, abs=1e-9)
    assert loc.grad.abs().max() > 0


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
    with pytest.raises(ValueError, match="guide: its site 'z' needs a value for each element of its plates"):
        trainer.step(*task.args, {"z": z["z"][:1]}, z)
    for beta in (0.0, -1.0, math.inf, math.nan, True):
        with pytest.raises(ValueError, match="beta"):
            task.trainer(DirectPreferenceOptimization, beta=beta)
