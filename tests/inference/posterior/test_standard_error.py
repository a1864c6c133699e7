"""Standard errors against the deviation over many runs: each element of a plate is a run of its own."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from plate_of_three import X, Y, model
from torch import Tensor

from lmppl.distributions import AutoregressiveText
from lmppl.inference import SMC, Enumeration, Importance, MetropolisHastings, Posterior, Sequential, lineages

RUNS = 300


class Letters(AutoregressiveText):
    """Five letters of two, each after those before it."""

    def __init__(self, again: float):
        self.again = again  # the log odds that a letter is the one before it
        super().__init__(["a", "b"], (RUNS,), max_tokens=5, stop=None)

    def next_logits(self, prefix, element):
        if not prefix.shape[1]:
            return torch.zeros(len(prefix), 2, dtype=torch.double)
        return self.again * torch.nn.functional.one_hot(prefix[:, -1], 2).double()


def program():
    with pyro.plate("runs", RUNS):
        z = pyro.sample("z", Letters(0.7))
        pyro.factor("f", 1.0 * (z == 1).sum(-1).double())


def guide():
    with pyro.plate("runs", RUNS):
        pyro.sample("z", Letters(0.0))


def begins_with_b(posterior: Posterior) -> Tensor:
    return (posterior.samples["z"][..., 0] == 1).double()  # (N, runs)


def compared(posterior: Posterior) -> tuple[float, float]:
    """The root mean square of the standard errors, and the deviation of the estimates over the runs."""
    f = begins_with_b(posterior)
    errors = torch.stack([posterior.standard_error(f[:, i], i) for i in range(RUNS)])
    means = (posterior.log_weights.double().softmax(0) * f).sum(0)
    return float(errors.square().mean().sqrt()), float(means.std())


def test_importance_sampling():
    error, deviation = compared(Importance(program, guide, num_particles=200).run())
    assert error == pytest.approx(deviation, rel=0.15)  # the deviation of 300 runs is known to 4%


def test_smc_counts_common_ancestors():
    posterior = SMC(program, guide, num_particles=200, ess_threshold=1.0).run()
    assert isinstance(posterior, Sequential) and len(posterior.ancestry) >= 2
    error, deviation = compared(posterior)
    assert error == pytest.approx(deviation, rel=0.2)
    plain = Posterior(posterior.values, posterior.log_weights, posterior.log_evidence, Importance(program).run().sites)
    assert compared(plain)[0] < 0.9 * error  # as if they were independent


def test_smc_with_few_particles_counts_what_merges_by_chance():
    """Two lines of descent merge with probability 1 / N at each resampling, which hides some of the variance."""
    torch.manual_seed(0)
    posterior = SMC(program, guide, num_particles=12, ess_threshold=1.0, resampling="multinomial").run()
    f, first = begins_with_b(posterior)[:, 0], lineages(posterior.ancestry)[0, :, 0]
    w = posterior.log_weights[:, 0].double().softmax(0)
    merged = sum(float((w * (f - (w * f).sum()))[first == e].sum()) ** 2 for e in range(12))
    times = sum(int(event.resampled[0]) for event in posterior.ancestry)
    assert times >= 3
    assert float(posterior.standard_error(f, 0)) == pytest.approx((merged * (12 / 11) ** times) ** 0.5)


def test_markov_chains_count_autocorrelation():
    posterior = MetropolisHastings(program, num_chains=4, num_samples=50, warmup=10).run()
    error, deviation = compared(posterior)
    assert error == pytest.approx(deviation, rel=0.25)
    f = begins_with_b(posterior)
    assert error > 1.2 * float((f.var(0) / len(f)).mean().sqrt())  # as if they were independent


def test_equal_weights_have_the_binomial_error():
    def coin():
        pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))

    posterior = Importance(coin, num_particles=50).run()
    k = posterior.samples["k"]
    p = float(k.mean())
    assert float(posterior.standard_error(k)) == pytest.approx((p * (1 - p) / 50) ** 0.5, rel=1e-5)
    both = posterior.standard_error(torch.stack([k, 1 - k, 2 * k], -1))
    assert both.tolist() == pytest.approx([float(posterior.standard_error(k)) * c for c in (1, 1, 2)])


def test_particles_of_weight_zero_do_not_count():
    def program():
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        pyro.factor("f", torch.where(k == 2, -torch.inf, 0.0))

    posterior = Importance(program, num_particles=60).run()
    f = torch.where(posterior.samples["k"] == 2, torch.inf, posterior.samples["k"].float())
    assert 0 < float(posterior.standard_error(f)) < 0.2


def test_copies_have_no_standard_error(tmp_path, particles):
    f = torch.arange(60.0)
    assert float(particles.standard_error(f, 0)) > 0
    assert particles.resample(60).standard_error(f, 0).isnan()
    smc = SMC(model, num_particles=60, ess_threshold=1.0, twist="stop").run(X, Y)
    assert smc.ancestry and float(smc.standard_error(f, 0)) > 0
    for name, posterior in (("smc", smc), ("copies", particles.resample(60)), ("own", particles)):
        posterior.save(tmp_path / name)
        loaded = Posterior.load(tmp_path / name)
        assert bool(loaded.standard_error(f, 0).isnan()) == (name != "own"), name  # a file has no ancestry
    one = SMC(model, num_particles=1).run(X, Y)
    assert one.standard_error(torch.ones(1), 0) >= 0


def test_one_common_ancestor_tells_no_error():
    def program():
        k = pyro.sample("k", dist.Normal(0.0, 1.0))
        pyro.factor("one", 1e4 * k)
        pyro.sample("j", dist.Normal(0.0, 1.0))

    posterior = SMC(program, num_particles=20).run()
    assert float(posterior.survival) == pytest.approx(1 / 20)
    assert posterior.standard_error(posterior.samples["j"]).isnan()


def test_an_enumeration_has_none():
    exact = Enumeration(model).run(X, Y)
    assert exact.standard_error(exact.log_weights[:, 0], 0) == 0


def test_values_are_one_of_each_particle(particles):
    with pytest.raises(ValueError, match="^values: expected a tensor of 60 particles"):
        particles.standard_error(torch.ones(3), 0)
    with pytest.raises(ValueError, match="^index: "):
        particles.standard_error(torch.ones(60))


def test_predictions_have_one_only_from_independent_particles(particles):
    """Copies, chains, lines of descent and enumerated values carry weights that tell no error."""
    f = torch.arange(60.0)
    kept = particles.predictive(model, X, Y).draws
    assert torch.equal(kept.samples["z"], particles.samples["z"])
    assert float(kept.standard_error(f, 0)) == pytest.approx(float(particles.standard_error(f, 0)))
    assert float(particles.predictive(model, X, Y, sampler="prior").draws.standard_error(f, 0)) > 0
    chains = MetropolisHastings(model, num_chains=3, num_samples=20, warmup=2).run(X, Y)
    for posterior in (particles.resample(60), chains, SMC(model, num_particles=60).run(X, Y)):
        assert posterior.predictive(model, X, Y).draws.standard_error(f, 0).isnan(), type(posterior)
    exact = Enumeration(model).run(X, Y)
    found = exact.predictive(model, X, Y).draws
    assert found.standard_error(found.log_weights[:, 0].exp(), 0).isnan()
    assert particles.predictive(model, X, Y, num_particles=60).draws.standard_error(f, 0).isnan()  # resampled
