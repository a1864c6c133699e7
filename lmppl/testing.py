"""`TextContract`: tests of what a distribution over texts must satisfy, for distributions of your own.

It needs pytest. The package's own distributions pass the same tests.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor

from . import text
from .distributions.protocols import PrefixScores, Stepwise, Terminable, Text
from .inference.core.sites import text_of
from .text import PAD

__all__ = ["TextContract", "support"]

MOST = 20_000  # texts that `support` enumerates


def support(d: Any) -> Tensor:
    """Returns every text that is possible in some element of the batch.

    It uses ``enumerate_support`` if there is one; else it searches token by token with ``token_steps``.

    :param d: a distribution over texts with at most 20,000 texts.
    :returns: LongTensor (K, L), distinct.

    >>> len(support(Completion(lm, x, max_tokens=1, allowed=only(lm, ["a", "b", "eos"]))))
    3
    """
    if d.has_enumerate_support:
        every = d.enumerate_support()
        return torch.unique(every.reshape(-1, every.shape[-1]), dim=0)
    assert isinstance(d, Stepwise), "a text without steps needs enumerate_support"
    steps, done = d.token_steps(d.batch_shape), []
    while len(steps.prefix):
        done.append(text.pad(steps.prefix[steps.ended], d.event_shape[0]))
        if steps.prefix.shape[1] == d.event_shape[0]:
            done.append(steps.prefix[~steps.ended])
            break
        steps.select((~steps.ended).nonzero()[:, 0])
        if not len(steps.prefix):
            break
        tokens = torch.arange(d.vocab_size)
        possible = torch.stack([steps.score(v.expand(len(steps.prefix))) for v in tokens], 1) > -torch.inf
        row, token = possible.nonzero().unbind(1)
        assert len(row) <= MOST, "the distribution has too many texts to be tested; make a smaller one"
        steps.select(row)
        steps.append(token)
    return torch.unique(torch.cat(done), dim=0)


class TextContract:
    """Tests of a distribution over texts; a subclass defines `distribution` and inherits the tests.

    The distribution must have a batch of two elements, (2,), few texts, so that all can be enumerated, and double
    precision. Its methods show which capabilities (`lmppl.distributions.protocols`) it has; these are tested.

    Example::

        class TestMine(TextContract):
            def distribution(self):
                return Mine(torch.tensor([[0.2, 0.8], [0.5, 0.5]]))
    """

    def distribution(self) -> TorchDistribution:
        """Returns the distribution to test, the ``d`` of the tests."""
        raise NotImplementedError

    @pytest.fixture
    def d(self) -> Any:
        """The distribution, a new one for each test."""
        return self.distribution()

    def test_it_is_a_text(self, d: Any) -> None:
        assert isinstance(d, Text) and d.batch_shape == (2,) and len(d.event_shape) == 1
        assert d.stop.dtype == torch.long and d.stop.dim() == 1

    def test_shapes(self, d: Any) -> None:
        pyro.set_rng_seed(0)
        assert d.sample().shape == d.shape()
        z = d.sample((3, 4))
        assert z.shape == (3, 4, *d.shape()) and z.dtype == torch.long
        text.validate(z, "sample")
        log_p = d.log_prob(z)
        assert log_p.shape == (3, 4, 2) and bool(log_p.isfinite().all())

    def test_normalised(self, d: Any) -> None:
        every = support(d)
        assert d.log_prob(every[:, None]).logsumexp(0).abs().max() < 1e-9
        text.validate(every, "support")

    def test_samples_follow_log_prob(self, d: Any) -> None:
        """Pearson's chi-square over cells with an expected count of at least 5, within 5 standard deviations."""
        pyro.set_rng_seed(1)
        n, every = 3000, support(d)
        drawn, log_p = text.pad(d.sample((n,)), every.shape[-1]), d.log_prob(every[:, None])
        for b in range(2):
            p = log_p[:, b].exp().detach()
            count = (drawn[:, b, None] == every).all(-1).sum(0).double()
            assert count.sum() == n and bool((count[p == 0] == 0).all())
            large = p * n >= 5
            cells = torch.cat([count[large], count[~large].sum()[None]])
            expected = torch.cat([p[large], p[~large].sum()[None]]).double() * n
            cells, expected = cells[expected > 1e-9], expected[expected > 1e-9]
            chi2, dof = ((cells - expected) ** 2 / expected).sum().item(), len(cells) - 1
            assert chi2 < dof + 5 * math.sqrt(2 * max(dof, 1)) + 5

    def test_narrow_and_wide_values_are_the_same_text(self, d: Any) -> None:
        pyro.set_rng_seed(2)
        z = d.sample((20,))
        log_p = d.log_prob(z)
        narrow = z[..., : max(1, int(text.length(z).max()))]
        for other in (narrow, text.pad(z, z.shape[-1] + 2)):
            assert (d.log_prob(other) - log_p).abs().max() < 1e-9

    def test_decode(self, d: Any) -> None:
        strings = d.decode(d.sample((3,)))
        assert len(strings) == 3 and all(len(row) == 2 and all(isinstance(s, str) for s in row) for row in strings)

    def test_steps_are_the_texts_token_by_token(self, d: Any) -> None:
        """Draws, scores and `log_prob` give the same log-probability.

        They do so also after rows were reordered, repeated or dropped.
        """
        stepwise = isinstance(d, Stepwise)
        if not stepwise:
            pytest.skip("no token_steps")
        pyro.set_rng_seed(3)
        site = text_of(d.expand((6, 2)))
        assert site is not None
        steps, scored = site.steps(), torch.zeros(12, dtype=torch.double)
        drawn = torch.zeros(12, dtype=torch.double)
        for t in range(d.event_shape[0]):
            token, log_p = steps.draw(torch.rand(12, dtype=torch.double))
            scored = scored + steps.score(token).masked_fill(steps.ended, 0.0)
            drawn = drawn + log_p
            steps.append(token)
            assert steps.prefix.shape == (12, t + 1)
            chosen = torch.randint(6, (6, 2)) * 2 + torch.arange(2)  # each stays in its element of the batch
            steps.select(chosen.flatten())
            scored, drawn = (x[chosen.flatten()] for x in (scored, drawn))
        assert bool(steps.ended.all())
        log_prob = d.log_prob(steps.prefix.view(6, 2, -1)).flatten()
        assert (drawn - log_prob).abs().max() < 1e-9 and (scored - log_prob).abs().max() < 1e-9

    def test_prefix_scores_are_those_of_stopped_prefixes(self, d: Any) -> None:
        """log p(z_1..z_t stop) is that of `log_prob`.

        P(stop | z_1..z_t) is its share of all texts that begin like it.
        """
        terminable = isinstance(d, Terminable)
        if not terminable or not d.stop.numel():
            pytest.skip("no prefix_scores")
        pyro.set_rng_seed(4)
        site, every = text_of(d), support(d)
        assert site is not None
        z = d.sample((10,))
        ending = site.ending(z)
        scores = PrefixScores(*(x.detach() for x in d.prefix_scores(z)))
        log_p = d.log_prob(every[:, None]).detach()  # (K, 2)
        for n in range(10):
            for b in range(2):
                for t in range(int(ending.at[n, b]) + 1):
                    begins = (every[:, :t] == z[n, b, :t]).all(1)
                    stop = PAD if bool(ending.by_string[n, b] & (ending.at[n, b] <= t)) else int(ending.stop[n, b])
                    own = text.pad(torch.cat([z[n, b, :t], torch.tensor([stop])])[None], every.shape[-1] + 1)[0]
                    same = (text.pad(every, every.shape[-1] + 1) == own).all(1)
                    expected = log_p[same, b].logsumexp(0) if bool(same.any()) else torch.tensor(-torch.inf)
                    assert float(scores.log_probs[n, b, t]) == pytest.approx(float(expected), abs=1e-9)
                    given = expected - log_p[begins, b].logsumexp(0)
                    if not bool(ending.by_string[n, b]):
                        assert float(scores.stop_log_probs[n, b, t]) == pytest.approx(float(given), abs=1e-9)
                assert bool((scores.log_probs[n, b, int(ending.at[n, b]) + 1 :] == -torch.inf).all())

    def test_masked_and_reinterpreted(self, d: Any) -> None:
        z = d.sample()
        plain = d.log_prob(z).detach()
        mask = torch.tensor([True, False])
        assert (d.mask(mask).log_prob(z) - plain * mask).abs().max() < 1e-9
        assert d.to_event(1).batch_shape == () and (d.to_event(1).log_prob(z) - plain.sum()).abs() < 1e-9
        wide = d.expand((6, 2))
        assert wide.batch_shape == (6, 2) and wide.sample().shape == (6, *d.shape())
        assert (wide.log_prob(z) - plain).abs().max() < 1e-9
        site = text_of(wide.mask(mask).to_event(1))
        assert site is not None and site.shape == (6, 2) and site.stacked == 1
        value, log_prob = site.draw()
        assert (log_prob - d.log_prob(value)).abs().max() < 1e-9
        assert (site.lift(log_prob) - d.log_prob(value)[:, 0]).abs().max() < 1e-9

    def test_trace_replay_condition_block(self, d: Any) -> None:
        def model(obs: Tensor | None = None) -> Tensor:
            with pyro.plate("data", 2):
                z: Tensor = pyro.sample("z", d, obs=obs)
            return z

        trace = poutine.trace(model).get_trace()
        z = trace.nodes["z"]["value"]
        expected = pytest.approx(d.log_prob(z).sum().item(), abs=1e-9)
        assert trace.log_prob_sum().item() == expected
        assert bool((poutine.replay(model, trace=trace)() == z).all())
        conditioned = poutine.trace(pyro.condition(model, data={"z": z})).get_trace()
        assert conditioned.nodes["z"]["is_observed"] and conditioned.log_prob_sum().item() == expected
        scaled = poutine.trace(poutine.scale(model, 0.25)).get_trace(z)
        assert 4 * scaled.log_prob_sum().item() == expected
