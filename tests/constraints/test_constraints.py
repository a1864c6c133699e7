"""Constraints against brute force: every text of a small vocabulary; masked proposals; a mask is no condition."""

from __future__ import annotations

from itertools import product

import pyro
import pytest
import torch
from constraint_cases import AB, CASES, Case, tensor
from ngrams import written_lm
from reference import Law, Plain, Tokens
from tiny import flat_lm
from torch import Tensor

from lmppl import LanguageModel
from lmppl.constraints import PrefixConstraint, regex
from lmppl.constraints.masks import keeps
from lmppl.distributions import Completion
from lmppl.engine.tuning import TUNING
from lmppl.inference import SMC, Enumeration, Importance
from lmppl.text import PAD, length, pad


@pytest.fixture(params=CASES, ids=CASES)
def case(request) -> Case:
    return CASES[request.param]


# -- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [[0, 2, 3], [0, 2, 3, 5, 6], None], ids=["three", "five", "all"])
@pytest.mark.parametrize("stop", ["eos", [0, 3], None], ids=["eos", "two stops", "none"])
@pytest.mark.parametrize("broader", [{}, {"temperature": 1.7, "epsilon": 0.2}], ids=["own", "broader"])
def test_a_draw_among_few_tokens_is_that_draw_among_all(allowed, stop, broader, monkeypatch):
    lm = flat_lm(dtype=torch.float64)
    least = 0 if stop is None else 2
    text = Completion(lm, torch.tensor([4, 5]), max_tokens=4, min_tokens=least, stop=stop, allowed=allowed)
    drawn = []
    for few in (0.0, 2.0):
        monkeypatch.setattr(TUNING, "few_permitted", few)
        torch.manual_seed(0)
        drawn.append(text.broadened(**broader).sample_and_log_prob((50,)))
    (z, log_p), (other, log_other) = drawn
    assert torch.equal(z, other)
    torch.testing.assert_close(log_p, log_other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_p, text.broadened(**broader).log_prob(z), rtol=1e-9, atol=1e-9)


# -- the contract ----------------------------------------------------------------------------------------------------


def test_the_texts_allowed_token_by_token_are_the_texts_accepted(case):
    texts = case.texts()
    z, expected = tensor(texts), torch.tensor([case.says(z) for z in texts])
    assert bool(expected.any()) and not bool(expected.all())
    allowed = case.make()
    assert torch.equal(keeps(allowed, z, case.lm.vocab_size), expected)
    if isinstance(allowed, PrefixConstraint):
        assert torch.equal(allowed.accepts(z), expected)
        indicator = allowed.log_indicator(z.view(1, *z.shape))
        assert indicator.shape == (1, len(z)) and torch.equal(indicator[0].exp(), expected.float())


def test_what_is_allowed_can_be_completed(case):
    """A mask that looks no further than the next token would let texts into dead ends."""
    if not case.tight:
        return
    accepted = {z[:t] for z in case.texts(case.max_tokens + 1) if case.says(z) for t in range(len(z))}
    prefixes = [z[:-1] for z in case.texts(2)]
    kept = keeps(case.make(), tensor(prefixes), case.lm.vocab_size)
    for prefix, allowed in zip(prefixes, kept.tolist(), strict=True):
        assert allowed == (prefix in accepted), prefix


def test_masks_of_a_batch_are_those_of_its_rows_in_any_order(case):
    allowed = case.make()
    if isinstance(allowed, Tensor):
        assert allowed.shape == (case.lm.vocab_size,) and allowed.dtype == torch.bool
        return
    for t in range(3):
        prefix = torch.randint(1, case.lm.vocab_size, (2, 5, t))
        mask = allowed(prefix).expand(2, 5, -1)
        assert mask.shape == (2, 5, case.lm.vocab_size) and mask.dtype == torch.bool
        order = torch.randperm(5)
        assert torch.equal(allowed(prefix[:, order]).expand(2, 5, -1), mask[:, order])
        for i, j in product(range(2), range(5)):
            assert torch.equal(case.make()(prefix[i, j]).expand(case.lm.vocab_size), mask[i, j])


def test_the_masked_distribution_is_the_one_defined_by_loops(case):
    """It normalises over all texts, and each has the probability that a loop over tokens gives it."""
    allowed = case.make()

    def after(prefix: Tokens) -> set[int]:
        mask = allowed if isinstance(allowed, Tensor) else allowed(torch.tensor(prefix, dtype=torch.long))
        return set(mask.nonzero()[:, 0].tolist())

    fn = case.completion(max_tokens=2)
    law = Law(Plain(case.lm), tuple(case.prompt.tolist()), 2, stops=case.stops, allowed=after, temperature=3.0)
    texts = case.texts(2)
    with torch.no_grad():
        found = fn.log_prob(tensor(texts)).double()
    expected = torch.tensor([law.log_prob(z) for z in texts], dtype=torch.double)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_samples_are_accepted_unless_the_limit_cut_them(case):
    fn = case.completion()
    z = fn.sample((300,))
    cut = length(z) == case.max_tokens + 1
    kept = torch.tensor([case.says(tuple(i for i in row if i != PAD)) for row in z.tolist()])
    assert bool((kept | cut).all()) and bool(kept.any())
    value, log_prob = fn.sample_and_log_prob((50,))
    torch.testing.assert_close(log_prob, fn.log_prob(value).detach(), rtol=1e-9, atol=1e-9)


# -- the masked language model as a proposal --------------------------------------------------------------------------

RUNS = 400
CONDITION = regex(AB, "(?:ab|b)+")


def prior(**kwargs) -> Completion:
    return Completion(AB, "ab", **{"max_tokens": 3, "temperature": 3.0} | kwargs)


def conditioned():
    with pyro.plate("runs", RUNS):
        z = pyro.sample("z", prior())
        pyro.factor("condition", CONDITION.log_indicator(z))


def masked():
    with pyro.plate("runs", RUNS):
        pyro.sample("z", prior(allowed=CONDITION))


def test_the_weight_of_a_text_is_the_mass_that_the_mask_kept():
    """p(z) c(z) / q(z) = prod_t sum_v p(v | z_<t) c(v | z_<t), for texts that the limit did not cut."""
    plain, p, q = Law(Plain(AB), (4,), 3, temperature=3.0), prior(), prior(allowed=CONDITION)
    accepted = [z for z in CASES["ban"].texts(2) if bool(CONDITION.accepts(torch.tensor(z)))]
    assert len(accepted) > 5
    for z in accepted:
        expected = 0.0
        for t in range(len(z)):
            kept = CONDITION(torch.tensor(z[:t], dtype=torch.long))
            expected += float(plain.next(z[:t]).exp()[kept].sum().log())
        value = pad(torch.tensor(z), 4)
        assert float((p.log_prob(value) - q.log_prob(value)).detach()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("particles", [1, 8])
@pytest.mark.parametrize("algorithm", [Importance, SMC])
def test_masked_proposals_estimate_the_evidence_of_the_condition(algorithm, particles):
    with torch.no_grad():
        z = prior().enumerate_support()
        joint = prior().log_prob(z) + CONDITION.log_indicator(z)
    exact = float(joint.exp().sum())
    estimates = algorithm(conditioned, masked, num_particles=particles).run().log_evidence.exp().double()
    error = float(estimates.std()) / RUNS**0.5
    assert abs(float(estimates.mean()) - exact) < 5 * error
    assert error < 0.1 * exact
    # Proposals that do not know the condition lose most particles to it.
    blind = algorithm(conditioned, num_particles=particles).run().log_evidence.exp()
    assert float(blind.std()) > 2 * float(estimates.std())


# -- a local mask is not a condition ----------------------------------------------------------------------------------


def two_tokens() -> LanguageModel:
    """First "a" 0.9 or "b" 0.1; after an "a" then "a" 0.8 or "b" 0.2; after a "b" then "a" 0.3 or "b" 0.7."""
    start, a, b = (torch.tensor([0, 0, *p]).log() for p in ((0.9, 0.1), (0.8, 0.2), (0.3, 0.7)))  # <eos> . a b
    return written_lm({(0,): start, (2,): a, (3,): b}, vocab=4, order=1)


def test_a_mask_and_a_condition_are_different_posteriors():
    """The text must end with "b".  p(ab) = 0.9 * 0.2 = 0.18 and p(bb) = 0.1 * 0.7 = 0.07: the condition gives "ab"
    0.18 / 0.25 = 0.72.  The mask forces the second token only: "ab" has 0.9, weight 0.2, and "bb" has 0.1, weight 0.7.
    """
    lm = two_tokens()
    ends = regex(lm, "[ab]b", stop=None)
    prompt = torch.tensor([0])

    def model():
        z = pyro.sample("z", Completion(lm, prompt, max_tokens=2, stop=None))
        pyro.factor("ends", ends.log_indicator(z))

    def local():
        pyro.sample("z", Completion(lm, prompt, max_tokens=2, stop=None, allowed=ends))

    condition, mask = Enumeration(model).run(), Enumeration(local).run()
    assert float(condition.log_evidence.exp()) == pytest.approx(0.25)
    assert dict(condition.table("z")) == pytest.approx({"ab": 0.72, "bb": 0.28})
    assert dict(mask.table("z")) == pytest.approx({"ab": 0.9, "bb": 0.1})
    posterior = SMC(model, local, num_particles=50, ess_threshold=0.0).run()
    by_text = dict(zip(lm.decode(posterior.samples["z"]), (posterior.log_weights.exp() * 50).tolist(), strict=True))
    assert by_text == pytest.approx({"ab": 0.2, "bb": 0.7})
