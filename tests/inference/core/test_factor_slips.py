"""Factors that are no log-probabilities: one line with the site's name."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from lmppl.inference import SMC, Importance


@pytest.mark.parametrize("value", [None, "x", math.nan, torch.zeros((), dtype=torch.complex64)])
@pytest.mark.parametrize("algorithm", [Importance, SMC])
def test_a_factor_that_is_no_log_probability(algorithm, value):
    def model():
        pyro.sample("b", dist.Bernoulli(0.5))
        pyro.factor("f", value)

    with pytest.raises(ValueError, match="site 'f': a factor is a log-probability"):
        algorithm(model, num_particles=4).run()


def test_an_observation_outside_the_support_names_its_site():
    def model():
        pyro.sample("y", dist.Normal(pyro.sample("b", dist.Bernoulli(0.5)), 1.0), obs=torch.tensor(math.nan))

    with pytest.raises(ValueError, match="site 'y'"):
        Importance(model, num_particles=4).run()
