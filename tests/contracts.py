"""The contract of a distribution over text, stated once, for each variant to inherit; and plain loops to follow."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from peft import LoraConfig
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import Predictive, Trace_ELBO, TraceGraph_ELBO
from reference import Law, Plain, Tokens, tokens
from tiny import tiny_lm

from lmppl import LanguageModel, testing, text
from lmppl.text import PAD

VOCAB = 5  # eos, ".", a, b, c
EOS, DOT, A, B, C = range(VOCAB)


def after(prefix: Tokens) -> set[int]:
    """A constraint on prefixes: no token twice in a row."""
    return set(range(VOCAB)) - set(prefix[-1:])


def after_mask(prefix: torch.Tensor) -> torch.Tensor:
    """`after`, as the package takes it."""
    mask = torch.ones(*prefix.shape[:-1], VOCAB, dtype=torch.bool)
    return mask if prefix.shape[-1] == 0 else mask.scatter(-1, prefix[..., -1:], False)


def assert_follows(d: TorchDistribution, laws: list[Law]) -> None:
    """The support of ``d`` (batch (len(laws),)) sums to one and has each law's probabilities."""
    support = d.enumerate_support(expand=False)
    log_probs = d.log_prob(support)
    assert log_probs.shape == (len(support), len(laws))
    assert log_probs.logsumexp(0).abs().max() < 1e-9
    for i, law in enumerate(laws):
        found = {tokens(z[0]): p for z, p in zip(support, log_probs[:, i].tolist(), strict=True) if p > -math.inf}
        expected = law.support()
        assert found.keys() == expected.keys()
        assert max(abs(found[z] - expected[z]) for z in expected) < 2e-5


class LMDistributionContract:
    """What any distribution over text promises.  A subclass says how to make one; ``make(lm)`` has batch (2,)."""

    vocab, add_bos, layers = VOCAB, False, 1

    def make(self, lm: LanguageModel) -> TorchDistribution:
        raise NotImplementedError

    @pytest.fixture
    def lm(self) -> LanguageModel:
        return tiny_lm("gpt2", vocab=self.vocab, add_bos=self.add_bos, layers=self.layers)

    @pytest.fixture
    def d(self, lm) -> TorchDistribution:
        return self.make(lm)

    @pytest.fixture
    def support(self, d) -> torch.Tensor:
        return d.enumerate_support()  # (K, 2, *event)

    def test_shapes(self, d):
        assert d.batch_shape == (2,) and d.event_dim == len(d.event_shape)
        assert d.sample().shape == d.shape() and d.sample((3, 4)).shape == (3, 4, *d.shape())
        assert d.log_prob(d.sample((3,))).shape == (3, 2)
        assert d.enumerate_support(expand=False).shape[1:] == (1, *d.event_shape)

    def test_normalised(self, d, support):
        assert d.log_prob(support).logsumexp(0).abs().max() < 1e-9

    def test_support_texts_are_distinct_and_well_formed(self, d, support):
        assert len(torch.unique(support[:, 0], dim=0)) == len(support)
        assert d.support.check(support).all()

    def test_samples_lie_in_the_support(self, d):
        z = d.sample((100,))
        assert d.support.check(z).all() and d.log_prob(z).isfinite().all()

    def test_samples_follow_log_prob(self, d, support):
        """Pearson's chi-square over cells with an expectation of at least 5, within 5 standard deviations."""
        pyro.set_rng_seed(1)
        n = 3000
        drawn = d.sample((n,))
        for b in range(2):
            p = d.log_prob(support)[:, b].exp()
            flat = support[:, b].reshape(len(support), -1)
            same = (drawn[:, b].reshape(n, 1, -1) == flat).all(-1)
            count = same.sum(0).double()
            assert count.sum() == n and (count[p == 0] == 0).all()
            large = p * n >= 5
            cells = torch.cat([count[large], count[~large].sum()[None]])
            expected = torch.cat([p[large], p[~large].sum()[None]]).double() * n
            cells, expected = cells[expected > 1e-9], expected[expected > 1e-9]
            chi2, dof = ((cells - expected) ** 2 / expected).sum(), len(cells) - 1
            assert chi2 < dof + 5 * math.sqrt(2 * max(dof, 1)) + 5

    def test_same_seed_same_texts_across_chunks(self, d, lm):
        pyro.set_rng_seed(7)
        whole = d.sample((20,))
        log_prob = d.log_prob(whole)
        before = lm.token_budget
        try:
            for lm.token_budget in (1, 17, 100):
                pyro.set_rng_seed(7)
                assert (d.sample((20,)) == whole).all()
                assert (d.log_prob(whole) - log_prob).abs().max() < 1e-9
        finally:
            lm.token_budget = before

    def test_gradient_reaches_the_adapter_and_nothing_else(self, lm):
        guide, other = (lm.with_adapter(LoraConfig(r=2, target_modules="all-linear")) for _ in range(2))
        _perturb(guide)
        d = self.make(guide)
        z = d.sample((4,))
        assert not z.requires_grad
        d.log_prob(z).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.trainable_parameters())
        assert any(p.grad.abs().max() > 0 for p in guide.trainable_parameters())
        assert all(p.grad is None for p in [*lm.trainable_parameters(), *other.trainable_parameters()])

    def test_gradient_of_total_probability_is_zero(self, lm):
        """sum_z p(z) = 1 whatever the parameters: the score has mean zero, exactly."""
        guide = lm.with_adapter(LoraConfig(r=2, target_modules="all-linear"))
        _perturb(guide)
        d = self.make(guide)
        d.log_prob(d.enumerate_support()).exp().sum().backward()
        assert all(p.grad.abs().max() < 1e-9 for p in guide.trainable_parameters())

    def test_expand_keeps_type_and_prompt(self, d, lm):
        wide = d.expand((6, 2))
        assert type(wide) is type(d) and wide.batch_shape == (6, 2) and wide.event_shape == d.event_shape
        z = wide.sample()
        assert z.shape == wide.shape()
        assert (wide.log_prob(z) - d.log_prob(z)).abs().max() < 1e-9
        one = z[0]
        before = lm.tokens_scored
        d.log_prob(one)
        cost = lm.tokens_scored - before
        again = self.make(lm).expand((6, 2))
        before = lm.tokens_scored
        assert again.log_prob(one).shape == (6, 2)
        assert lm.tokens_scored - before <= cost or cost == 0
        with pytest.raises((ValueError, RuntimeError)):
            d.expand((3,))

    def test_masked_and_reinterpreted(self, d):
        z = d.sample()
        plain = d.log_prob(z)
        masked = d.mask(torch.tensor([True, False]))
        assert (masked.log_prob(z) - plain * torch.tensor([1.0, 0.0])).abs().max() < 1e-9
        joint = d.to_event(1)
        assert joint.batch_shape == () and joint.log_prob(z).item() == pytest.approx(plain.sum().item(), abs=1e-9)
        for wrapped in (masked, joint):
            assert poutine.trace(lambda w=wrapped: pyro.sample("z", w)).get_trace().log_prob_sum().isfinite()

    # Under Pyro's handlers

    def program(self, lm):
        def model(obs=None):
            with pyro.plate("data", 2):
                return pyro.sample("z", self.make(lm), obs=obs)

        return model

    def test_trace_replay_condition_block(self, d, lm):
        model = self.program(lm)
        trace = poutine.trace(model).get_trace()
        z = trace.nodes["z"]["value"]
        expected = d.log_prob(z).sum().item()
        assert trace.log_prob_sum().item() == pytest.approx(expected, abs=1e-9)
        assert (poutine.replay(model, trace=trace)() == z).all()
        conditioned = poutine.trace(pyro.condition(model, data={"z": z})).get_trace()
        assert conditioned.nodes["z"]["is_observed"]
        assert conditioned.log_prob_sum().item() == pytest.approx(expected, abs=1e-9)
        assert "z" not in poutine.trace(poutine.block(model, hide=["z"])).get_trace().nodes
        assert isinstance(trace.nodes["z"]["fn"], type(d))

    def test_scale_and_mask(self, d, lm):
        z = d.sample()
        model = self.program(lm)
        scaled = poutine.trace(poutine.scale(model, 0.25)).get_trace(z).log_prob_sum()
        assert scaled.item() == pytest.approx(d.log_prob(z).sum().item() / 4, abs=1e-9)
        masked = poutine.trace(poutine.mask(model, mask=torch.tensor([False, True]))).get_trace(z).log_prob_sum()
        assert masked.item() == pytest.approx(d.log_prob(z)[1].item(), abs=1e-9)

    def test_particle_plate_left_of_a_data_plate(self, d, lm):
        def model():
            with pyro.plate("particles", 5, dim=-2), pyro.plate("data", 2, dim=-1):
                return pyro.sample("z", self.make(lm))

        trace = poutine.trace(model).get_trace()
        node = trace.nodes["z"]
        assert node["value"].shape == (5, 2, *d.event_shape)
        trace.compute_log_prob()
        assert (node["log_prob"] - d.log_prob(node["value"])).abs().max() < 1e-9

    def test_subsampled_plate(self, lm):
        def model():
            with pyro.plate("data", 4, subsample_size=2):
                return pyro.sample("z", self.make(lm))

        trace = poutine.trace(model).get_trace()
        expected = 2 * self.make(lm).log_prob(trace.nodes["z"]["value"]).sum().item()
        assert trace.log_prob_sum().item() == pytest.approx(expected, abs=1e-9)

    def test_predictive(self, d, lm):
        model = self.program(lm)
        for parallel in (False, True):
            drawn = Predictive(model, num_samples=3, parallel=parallel)()
            assert drawn["z"].shape == (3, 2, *d.event_shape) or drawn["z"].shape == (3, 1, 2, *d.event_shape)
            again = Predictive(model, posterior_samples={"z": drawn["z"]}, parallel=parallel, return_sites=["z"])()
            assert (again["z"] == drawn["z"]).all()

    def test_pyro_importance(self, d, lm):
        """exp of Pyro's log weights averages to the evidence of a factor on the text."""

        def model():
            z = pyro.sample("z", self.make(lm).mask(torch.tensor([True, False])).to_event(1))
            first = z[0] if z.dim() == 1 else z[0, 0]
            pyro.factor("f", torch.where(first == A, 0.0, -1.0))

        support = d.enumerate_support()[:, 0]
        first = support if support.dim() == 1 else support[:, 0]
        p = d.log_prob(d.enumerate_support())[:, 0].exp()
        exact = (p * torch.where(first == A, 1.0, math.exp(-1))).sum().item()
        pyro.set_rng_seed(3)
        n = 20
        posterior = pyro.infer.Importance(model, num_samples=n).run()
        weights = torch.stack(posterior.log_weights).exp()
        assert abs(weights.mean().item() - exact) < 5 * weights.std().item() / math.sqrt(n) + 1e-6

    @pytest.mark.parametrize("values", ["out of the vocabulary", "below PAD", "floats"])
    def test_malformed_values_raise(self, d, values):
        z = d.sample()
        bad = {"out of the vocabulary": z.clone().fill_(99), "below PAD": z.clone().fill_(-2), "floats": z.float()}
        with pytest.raises(ValueError, match="value"):
            d.log_prob(bad[values])

    def test_values_that_do_not_broadcast_raise(self, d):
        with pytest.raises(ValueError, match="value"):
            d.log_prob(d.sample()[:1].expand(3, *d.event_shape))


class TextContract(testing.TextContract, LMDistributionContract):
    """What a distribution over whole texts promises besides."""

    @pytest.fixture
    def d(self, lm):
        return self.make(lm)

    def laws(self, plain: Plain) -> list[Law]:
        raise NotImplementedError

    def test_probabilities_of_a_plain_loop(self, d, lm):
        assert_follows(d, self.laws(Plain(lm)))

    def test_sample_and_log_prob_agree(self, d):
        z, log_prob = d.sample_and_log_prob((50,))
        assert z.shape == (50, *d.shape()) and not log_prob.requires_grad
        assert (log_prob - d.log_prob(z)).abs().max() < 1e-9

    def test_token_log_probs(self, d, lm):
        z = d.sample((10,))
        by_token = d.token_log_probs(z)
        assert by_token.shape == z.shape and (by_token[z == PAD] == 0).all()
        assert (by_token.sum(-1) - d.log_prob(z)).abs().max() < 1e-9
        for b, law in enumerate(self.laws(Plain(lm))):
            value = tokens(z[0, b])
            expected = [law.step(value[:t])[v] for t, v in enumerate(value)]
            assert by_token[0, b, : len(value)].tolist() == pytest.approx(expected, abs=1e-9)

    def test_prefix_log_probs(self, d, lm):
        z = d.sample((10,))
        before = lm.tokens_scored
        d.log_prob(z)
        cost = lm.tokens_scored - before
        before = lm.tokens_scored
        by_prefix = d.prefix_log_probs(z)
        assert lm.tokens_scored - before == cost  # one pass, the same one
        limit = int(d.max_tokens.max())
        assert by_prefix.shape == (10, 2, limit + 1)
        for b, law in enumerate(self.laws(Plain(lm))):
            for row in range(3):
                if law.stops:
                    expected = law.prefix_log_probs(tokens(z[row, b]), limit + 1)
                else:
                    expected = [-math.inf] * (limit + 1)  # without a stop, no prefix is terminable
                assert by_prefix[row, b].tolist() == pytest.approx(expected, abs=1e-9)

    def test_width_of_values(self, d):
        """Narrower and wider values are the same texts; PAD in excess is nothing, a token in excess is impossible."""
        z = d.sample((20,))
        log_prob = d.log_prob(z)
        wide = text.pad(z, z.shape[-1] + 3)
        assert (d.log_prob(wide) - log_prob).abs().max() < 1e-9
        assert d.token_log_probs(wide).shape == wide.shape
        assert (d.prefix_log_probs(wide) - d.prefix_log_probs(z)).nan_to_num(0).abs().max() < 1e-9
        narrow = z[..., : max(1, int(text.length(z).max()))]
        assert (d.log_prob(narrow) - log_prob).abs().max() < 1e-9
        full = torch.full((2, d.event_shape[0] + 2), B)
        assert (d.log_prob(full) == -math.inf).all()

    def test_impossible_values(self, d):
        z = d.sample((10,))
        n = text.length(z)
        longer = text.cat(z, torch.tensor([B]))  # something after the stop
        assert (d.log_prob(longer) == -math.inf).all()
        cut = torch.where(torch.arange(z.shape[-1]) < (n - 1)[..., None], z, PAD)  # the last token is missing
        assert (d.log_prob(cut) == -math.inf).all()

    def test_padding_inside_raises(self, d):
        gap = torch.full((2, 3), PAD)
        gap[:, 1] = B
        with pytest.raises(ValueError, match="value"):
            d.log_prob(gap)

    def test_without_validation_malformed_values_are_not_checked_but_texts_still_score(self, lm):
        with pyro.validation_enabled(False):
            d = self.make(lm)
            z = d.sample()
            assert d.log_prob(z).isfinite().all()

    @pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
    def test_svi_gradient_is_the_elbo_s(self, lm, elbo):
        assert_elbo_gradient(self.make, lm, elbo(num_particles=512, vectorize_particles=True, max_plate_nesting=1), 8)


def assert_elbo_gradient(make, lm: LanguageModel, elbo, runs: int) -> None:
    """The mean of Pyro's score-function gradients is the exact gradient of -ELBO, by enumeration, to 5 s.e."""
    guide_lm = small_adapter(lm)
    params = guide_lm.trainable_parameters()
    reward = torch.linspace(-1, 1, lm.vocab_size)

    def score(z):
        return reward[z.clamp(min=0)][..., 0] + 0.1 * text.length(z)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", make(lm))
            pyro.factor("f", score(z))

    def guide():
        for i, p in enumerate(params):
            pyro.param(f"guide_{i}", p)
        with pyro.plate("data", 2):
            pyro.sample("z", make(guide_lm))

    q, p = make(guide_lm), make(lm)
    z = q.enumerate_support()
    log_q, log_p = q.log_prob(z), p.log_prob(z).detach() + score(z)
    possible = log_q.detach() > -math.inf
    log_q, log_p = log_q.masked_fill(~possible, 0.0), log_p.masked_fill(~possible, 0.0)
    objective = -(log_q.exp() * (log_p - log_q) * possible).sum()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(objective, params)])

    pyro.set_rng_seed(5)
    estimates = []
    for _ in range(runs):
        for x in params:
            x.grad = None
        elbo.loss_and_grads(model, guide)
        estimates.append(torch.cat([x.grad.flatten() for x in params]) @ exact / exact.norm())
    estimate = torch.stack(estimates)
    assert abs(estimate.mean() - exact.norm()) < 5 * estimate.std() / math.sqrt(runs)


def _perturb(lm: LanguageModel) -> None:
    """Move an adapter away from its start, where half of its gradients are zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for p in lm.trainable_parameters():
            p.normal_(std=0.3)


def small_adapter(lm: LanguageModel) -> LanguageModel:
    guide = lm.with_adapter(LoraConfig(r=1, target_modules=["c_attn"]))
    _perturb(guide)
    return guide
