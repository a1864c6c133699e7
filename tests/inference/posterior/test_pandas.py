"""A posterior as a DataFrame: its weighted means are those of its particles, whatever sites and plates there are."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plate_of_three import X, Y, joint, model

from lmppl.inference import Enumeration, Importance, MetropolisHastings, Posterior


def test_a_row_for_each_particle_of_each_plate_element(particles):
    table = particles.to_pandas()
    assert list(table.columns) == ["data", "particle", "z", "weight", "log_weight"] and len(table) == 3 * 60
    strings = particles.strings("z")
    for i in range(3):
        own = table[table.data == i].set_index("particle")
        assert own.z.tolist() == [row[i] for row in strings]
        assert own.weight.to_numpy() == pytest.approx(particles.probabilities[:, i].numpy())
        assert own.log_weight.to_numpy() == pytest.approx(particles.log_weights[:, i].numpy())
        assert own.groupby("z").weight.sum().to_dict() == pytest.approx(dict(particles.table("z", i)))


@settings(max_examples=25)
@given(st.data())
def test_weighted_means_are_those_of_the_particles(data):
    """Random programs of kept and other plates, numbers and vectors, some particles of weight zero."""
    sizes = data.draw(st.lists(st.integers(1, 3), max_size=2), "kept plates")
    others, length, n = (data.draw(st.integers(low, 3), name) for low, name in ((0, "others"), (1, "length"), (2, "n")))
    seed = data.draw(st.integers(0, 1000), "seed")
    inside = [pyro.plate(f"plate{i}", size, dim=-2 - i) for i, size in enumerate(sizes)]

    def program():
        with pyro.plate_stack("kept", sizes, rightmost_dim=-2) if inside else pyro.poutine.mask(mask=True):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            v = pyro.sample("v", dist.Dirichlet(torch.ones(length)))
            if others:
                with pyro.plate("others", others, dim=-1):
                    pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.factor("f", w + v[..., 0] + torch.where(w > 1.5, -torch.inf, 0.0))

    pyro.set_rng_seed(seed)
    posterior = Importance(program, num_particles=4 * n, max_plate_nesting=3).run()
    if bool((posterior.log_evidence == -torch.inf).any()):
        return
    table = posterior.to_pandas()
    names = [name for name in posterior.sites.plates.names]
    assert len(table) == posterior.log_weights.numel()
    weights = posterior.probabilities.double()
    right = weights.dim()
    for site, value in posterior.samples.items():
        expected = (weights.view(*weights.shape, *[1] * (value.dim() - right)) * value).sum(0)  # (*plates, ...)
        for entry in np.ndindex(*value.shape[right:]):
            column = f"{site}[{', '.join(map(str, entry))}]" if entry else site
            means = (table[column] * table.weight).groupby([table[n] for n in names] or (lambda row: 0)).sum()
            assert means.to_numpy() == pytest.approx(expected[(..., *entry)].flatten().numpy(), abs=1e-6), column


def test_chains_have_draws():
    chains = MetropolisHastings(model, num_chains=2, num_samples=5, warmup=2).run(X, Y)
    table = chains.to_pandas()
    assert list(table.columns[:3]) == ["data", "chain", "draw"] and len(table) == 3 * 2 * 5
    strings = np.array(chains.strings("z"), dtype=object).reshape(2, 5, 3)
    for row in table.itertuples():
        assert row.z == strings[row.chain, row.draw, row.data]


def test_an_enumeration_has_a_row_for_each_value_and_none_for_padding():
    exact = Enumeration(joint).run()
    table = exact.to_pandas()
    assert len(table) == exact.num_particles and table.weight.sum() == pytest.approx(1.0)
    assert table.groupby(["k", "z"]).weight.sum().to_dict() == pytest.approx(dict(exact.table(["k", "z"])))
    assert table.k.dtype == np.int64

    def uneven():
        with pyro.plate("data", 2):
            pyro.sample("k", dist.Categorical(logits=torch.tensor([[0.0, 0.0, -torch.inf], [0.2, 0.3, 0.5]])))

    found = Enumeration(uneven).run()
    assert found.to_pandas().groupby("data").size().to_dict() == {0: 2, 1: 3} and found.num_particles == 3


def test_names_that_are_taken_are_made_longer():
    def program():
        with pyro.plate("particle", 2):
            pyro.sample("weight", dist.Normal(0.0, 1.0))

    table = Importance(program, num_particles=3).run().to_pandas()
    assert list(table.columns) == ["particle_plate", "particle", "weight_site", "weight", "log_weight"]


def test_weights_are_undefined_where_all_are_zero(particles):
    log_weights = particles.log_weights.masked_fill(torch.tensor([True, False, False]), -torch.inf)
    table = Posterior(particles.values, log_weights, log_weights.logsumexp(0), particles.sites).to_pandas()
    assert table[table.data == 0].weight.isna().all() and (table[table.data == 0].log_weight == -np.inf).all()
    assert table[table.data != 0].weight.sum() == pytest.approx(2.0)
