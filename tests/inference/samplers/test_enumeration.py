"""Enumeration of one text against brute force: every text listed, every density computed by plain loops."""

from __future__ import annotations

import pyro
import pytest
import torch
from brute_force import LMS, SEED, Y, as_dict, assert_same, brute, infilling
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from tiny import flat_lm
from torch import Tensor

from lmppl import text
from lmppl.constraints import ban
from lmppl.distributions import Completion
from lmppl.inference import Enumeration, Importance, ZeroEvidence
from lmppl.inference.judging import quality

RULES = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(0, 3),
        "stop": st.sampled_from(["eos", ".", ("eos", "."), None]),
        "temperature": st.sampled_from([0.5, 1.0, 2.0]),
        "allowed": st.sampled_from([None, [0, 1, 2], [0, 1, 3, 4]]),
    },
)


@torch.no_grad()
def test_brute_force_is_a_plain_loop():
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    support, log_joint = brute(lm, x, y)
    for z, weight in zip(support, log_joint, strict=True):
        alone = Completion(lm, x, max_tokens=3).log_prob(z) + Completion(lm, lm.join(x, z), max_tokens=4).log_prob(y)
        assert float(alone) == pytest.approx(float(weight), abs=1e-9)


@settings(max_examples=40)
@given(SEED, st.sampled_from(["", "a", "ba"]), st.sampled_from(["", "a", "ab"]), RULES, st.data())
def test_the_posterior_equals_brute_force(seed, x, y, rules, data):
    lm = LMS[seed]
    rules["min_tokens"] = data.draw(st.integers(0, rules.get("max_tokens", 3)))
    x, y = lm.encode(x), lm.encode(y, stop="eos")
    support, log_joint = brute(lm, x, y, **rules)
    exact = Enumeration(infilling(lm, x, y, **rules)).run()
    assert_same(as_dict(exact.samples["z"], exact.log_weights), as_dict(support, log_joint))
    assert exact.log_evidence == pytest.approx(log_joint.logsumexp(0).item(), abs=1e-8)
    assert exact.log_weights.logsumexp(0) == exact.log_evidence
    assert float(exact.unexplored) == 0.0
    assert exact.log_evidence_bounds[0] == exact.log_evidence_bounds[1] == exact.log_evidence
    assert torch.allclose(exact.log_prior.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    assert exact.khat.isnan()


def test_log_prob_of_given_values():
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    exact = Enumeration(infilling(lm, x, y)).run()
    log_posterior = exact.log_weights - exact.log_evidence
    order = torch.randperm(len(log_posterior))
    wider = text.pad(exact.samples["z"], 9)[order]
    assert torch.equal(exact.log_prob(wider), log_posterior[order])
    assert torch.equal(exact.log_prob({"z": exact.samples["z"][3]}), log_posterior[3])
    outside = lm.encode("abab", stop="eos")
    assert exact.log_prob(outside) == -torch.inf
    partial = Enumeration(infilling(lm, x, y), mass=0.5).run()
    assert partial.log_prob(outside).isnan()
    with pytest.raises(ValueError, match="values: expected the sites"):
        exact.log_prob({"w": wider})


def test_a_masked_latent_keeps_its_prior():
    """As in importance sampling, where a masked site is drawn but neither scored by p nor by q."""
    lm = LMS[2]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")

    def model():
        with poutine.mask(mask=False):
            z = pyro.sample("z", Completion(lm, x, max_tokens=3))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=4), obs=y)

    def masked_distribution():
        z = pyro.sample("z", Completion(lm, x, max_tokens=3).mask(False))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=4), obs=y)

    plain = Enumeration(infilling(lm, x, y)).run()
    for program in (model, masked_distribution):
        assert torch.allclose(Enumeration(program).run().log_evidence, plain.log_evidence)


def test_prefix_constraints():
    lm = LMS[1]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")

    def never_twice(prefix: Tensor) -> Tensor:
        """No token twice in a row, except a stop."""
        mask = torch.ones(*prefix.shape[:-1], lm.vocab_size, dtype=torch.bool)
        if prefix.shape[-1]:
            mask.scatter_(-1, prefix[..., -1:], False)
        mask[..., 0] = True
        return mask

    for allowed in (never_twice, ban(lm, ["a"])):
        _, log_joint = brute(lm, x, y, allowed=allowed)
        exact = Enumeration(infilling(lm, x, y, allowed=allowed)).run()
        assert float(exact.log_evidence) == pytest.approx(float(log_joint.logsumexp(0)), abs=1e-8)
        assert int((exact.log_weights > -torch.inf).sum()) == int((log_joint > -torch.inf).sum())


def test_zero_evidence():
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode("ab")  # no stop: not a whole text
    found = Enumeration(infilling(lm, x, y)).run()
    assert found.log_evidence == -torch.inf
    assert found.ess == 0
    for use in (lambda: found.table("z"), lambda: found.resample(5)):
        with pytest.raises(ZeroEvidence):
            use()


def test_no_latent_site_is_the_evidence_itself():
    lm = LMS[0]
    x, y = lm.encode("a"), lm.encode("b", stop="eos")
    fn = Completion(lm, x, max_tokens=2)
    exact = Enumeration(lambda: pyro.sample("y", fn, obs=y)).run()
    assert torch.allclose(exact.log_evidence, fn.log_prob(y))
    assert float(exact.unexplored) == 0


def test_quality_of_draws_and_density_without_plates():
    lm, other = LMS[0], LMS[1]
    x, y = lm.encode("a"), lm.encode(Y, stop="eos")
    model = infilling(lm, x, y)
    exact = Enumeration(model).run()

    def guide():
        pyro.sample("z", Completion(other, x, max_tokens=3))

    found = Importance(model, guide, 50).run()
    assert 0 < float(quality.draw_quality(exact, found)) < 1
    q = Completion(other, x, max_tokens=3).log_prob(exact.samples["z"]).detach().exp()
    expected = 0.5 * float((q - exact.probabilities).abs().sum())
    assert float(quality.density_quality(exact, guide, (), {}).total_variation) == pytest.approx(expected, abs=1e-9)


def test_prompts_get_their_bos_once():
    """A tokenizer that puts a bos before any text, and prompts that are empty, alone and in a batch."""
    for add_bos in (False, True):
        lm = flat_lm("llama", vocab=6, dtype=torch.float64, add_bos=add_bos)
        x, y = lm.encode(["", "a"]), lm.encode(["a", "a"], stop="eos")

        def model(lm=lm, x=x, y=y):
            with pyro.plate("data", 2):
                z = pyro.sample("z", Completion(lm, x, max_tokens=2))
                pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=2), obs=y)

        exact = Enumeration(model).run()
        log_prior = Completion(lm, x, max_tokens=2).log_prob(exact.samples["z"])
        assert torch.allclose(log_prior, exact.log_prior)
