"""Uncertainty over chains and parameters: by plain loops, by identities, and the bias of few draws by enumeration."""

from __future__ import annotations

import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from five_sigma import within
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lmppl.inference import Ensemble, Enumeration, Importance, Prediction, Uncertainty, ZeroEvidence

PARTS = Uncertainty._fields


def H(p) -> float:
    return -sum(q * math.log(q) for q in p if q > 0)


def table(seed: int, C: int, K: int, B: int, impossible: float = 0.0) -> Prediction:
    """C answers by K latents: random, not normalised over answers, some of them impossible."""
    g = torch.Generator().manual_seed(seed)
    log_p = torch.randn(C, K, B, generator=g, dtype=torch.float64).mul(2).log_softmax(0) - 0.3
    log_p[torch.rand(C, K, B, generator=g) < impossible] = -torch.inf
    log_p[0, 0] = -1.0  # something is possible
    return Prediction([*"abcdef"[:C]], log_p, torch.randn(K, B, generator=g, dtype=torch.float64).log_softmax(0))


def by_loops(predictions: list[Prediction], weights: list[float]) -> dict[str, list[float]]:
    """From the joint p(theta, z, y), one number after another, given that y is one of the candidates."""
    found = {part: [] for part in PARTS}
    C, _, B = predictions[0].log_probs.shape
    for b in range(B):
        joint = {}
        for j, (p, pi) in enumerate(zip(predictions, weights, strict=True)):
            for n in range(p.log_probs.shape[1]):
                for c in range(C):
                    w = pi / sum(weights) * math.exp(p.log_weights[n, b])
                    joint[j, n, c] = w * math.exp(p.log_probs[c, n, b])
        total = sum(joint.values())
        joint = {k: v / total for k, v in joint.items()}

        def conditional(keep, joint=joint):
            """H(y | the coordinates that are kept)."""
            groups: dict[tuple, list[float]] = {}
            for key, mass in joint.items():
                group = groups.setdefault(tuple(key[i] for i in keep), [0.0] * C)
                group[key[2]] += mass
            return sum(sum(g) * H([x / sum(g) for x in g]) for g in groups.values() if sum(g) > 0)

        entropy, given_theta, given_both = conditional(()), conditional((0,)), conditional((0, 1))
        for part, value in zip(
            PARTS, (entropy, given_both, given_theta - given_both, entropy - given_theta), strict=True
        ):
            found[part].append(value)
    return found


@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 3), st.floats(0, 0.4))
def test_the_split_is_that_of_the_joint_by_plain_loops(seed, C, J, impossible):
    predictions = [table(seed + j, C, 2 + j, 2, impossible) for j in range(J)]
    weights = [1.0 + j for j in range(J)]
    found = Ensemble.of(predictions, torch.tensor(weights))
    for part, values in by_loops(predictions, weights).items():
        assert getattr(found.split(), part).tolist() == pytest.approx(values, abs=1e-9)


@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 4))
def test_identities(seed, C, J):
    """The parts add up, none is negative, and the pair's mutual information is the sum of the two."""
    found = Ensemble.of([table(seed + j, C, 3, 2, 0.2) for j in range(J)])
    u = found.split()
    torch.testing.assert_close(u.entropy, found.entropy)
    torch.testing.assert_close(u.expected_entropy, found.expected_entropy)
    torch.testing.assert_close(u.chain_information + u.parameter_information, found.mutual_information)
    torch.testing.assert_close(u.entropy, u.expected_entropy + u.chain_information + u.parameter_information)
    assert all(bool((part > -1e-12).all()) and bool((part < math.log(C) + 1e-12).all()) for part in u)
    if J == 1:
        assert u.parameter_information.abs().max() < 1e-12


def test_a_member_repeated_tells_nothing_of_parameters_and_its_own_prediction_comes_back():
    one = table(3, 3, 4, 2)
    thrice, once = Ensemble.of([one] * 3), Ensemble.of([one])
    for a, b in zip(thrice.split(), once.split(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert [len(m.log_weights) for m in thrice.members] == [4, 4, 4]
    torch.testing.assert_close(thrice.members[2].log_probs, one.log_probs)
    torch.testing.assert_close(thrice.members[2].log_weights, one.log_weights)
    torch.testing.assert_close(thrice.probabilities, one.probabilities)
    torch.testing.assert_close(thrice.vote, one.vote)
    assert repr(thrice) == "Ensemble('a', 'b', 'c': shape (12, 2) of 3 members)"


def test_members_that_are_certain_and_disagree_differ_by_parameters_alone():
    a, b = (
        Prediction(["a", "b"], torch.tensor(p).log()[:, None].expand(2, 4), torch.full((4,), 0.25).log())
        for p in ((1.0, 0.0), (0.0, 1.0))
    )
    u = Ensemble.of([a, b]).split()
    assert u.entropy == pytest.approx(math.log(2)) and u.parameter_information == pytest.approx(math.log(2))
    assert u.expected_entropy == u.chain_information == 0
    by_chains = Ensemble.of([Prediction(["a", "b"], torch.eye(2).log(), torch.full((2,), 0.5).log())]).split()
    assert by_chains.chain_information == pytest.approx(math.log(2)) and by_chains.parameter_information == 0


def test_answers_of_long_texts_do_not_underflow():
    one, far = table(5, 3, 4, 2), table(5, 3, 4, 2)
    far = Prediction(far.names, far.log_probs - 2000.0, far.log_weights)
    for a, b in zip(Ensemble.of([one, one]).split(), Ensemble.of([far, far]).split(), strict=True):
        torch.testing.assert_close(a, b)


# -- from draws --------------------------------------------------------------------------------------------------------


def every_sample(truth: list[Prediction], S: int) -> tuple[Ensemble, Tensor]:
    """Every way to draw S of two latents a member, in whatever order, as plates, and their probabilities."""
    firsts = torch.tensor([*product(range(S + 1), repeat=len(truth))]).T  # (J, ways): how often the first latent
    equal = torch.full((S, firsts.shape[1]), 1 / S, dtype=torch.float64).log()
    drawn = [(torch.arange(S)[:, None] >= k).long() for k in firsts]  # (S, ways)
    pairs = list(zip(truth, firsts, drawn, strict=True))
    log_p = sum(dist.Binomial(S, t.log_weights[0, 0].exp()).log_prob(k.double()) for t, k, _ in pairs)
    return Ensemble.of([Prediction(t.names, t.log_probs[:, z, 0], equal) for t, _, z in pairs]), log_p.exp()


def bias(truth: list[Prediction], S: int, estimate: str) -> dict[str, float]:
    drawn, p = every_sample(truth, S)
    exact = Ensemble.of(truth).split()
    assert float(p.sum()) == pytest.approx(1)
    return {
        part: float((p * values).sum() - at[0])
        for part, values, at in zip(PARTS, getattr(drawn, estimate)(), exact, strict=True)
    }


def normal(seed: int, K: int = 2) -> Prediction:
    """Answers that no latent rules out, normalised."""
    t = table(seed, 2, K, 1)
    return Prediction(t.names, t.log_probs.log_softmax(0), t.log_weights)


def first_order(t: Prediction) -> float:
    r""":math:`\frac12 \sum_c Var_z p(c|z) / p(c)`: the bias of one draw, to first order."""
    w, p = t.log_weights[:, 0].exp(), t.log_probs[:, :, 0].exp()
    mean = (w * p).sum(1)
    return float((((w * p**2).sum(1) - mean**2) / mean).sum() / 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_bias_of_few_chains_by_every_sample_there_is(seed):
    """Of one member: entropy and chain information fall short by b / S + O(1 / S^2), the jackknife by O(1 / S^2)."""
    truth, many = [normal(seed)], (16, 32, 64)
    plain, mended = ({S: bias(truth, S, how) for S in many} for how in ("split", "jackknife"))
    for S in many:
        assert abs(plain[S]["expected_entropy"]) < 1e-12 and abs(mended[S]["expected_entropy"]) < 1e-12
        assert plain[S]["chain_information"] == pytest.approx(plain[S]["entropy"])
    b = first_order(truth[0])
    assert b > 1e-3
    for fewer, more in ((16, 32), (32, 64)):  # half, and a fourth
        assert plain[more]["entropy"] / plain[fewer]["entropy"] == pytest.approx(1 / 2, abs=0.05)
        assert mended[more]["entropy"] / mended[fewer]["entropy"] == pytest.approx(1 / 4, abs=0.05)
        rests = [plain[S]["entropy"] + b / S for S in (more, fewer)]
        assert rests[0] / rests[1] == pytest.approx(1 / 4, abs=0.05)


def test_the_noise_of_few_chains_looks_like_members_that_disagree():
    """Two members that are alike: parameter information is b / 2S too large, and the jackknife's a tenth of it."""
    truth, S = [normal(1), normal(1)], 12
    plain, mended = bias(truth, S, "split"), bias(truth, S, "jackknife")
    b = first_order(truth[0])
    assert plain["parameter_information"] == pytest.approx(b / S / 2, rel=0.3)
    assert plain["chain_information"] == pytest.approx(-b / S, rel=0.3)
    assert abs(mended["parameter_information"]) < 0.1 * plain["parameter_information"]
    assert abs(mended["chain_information"]) < 0.15 * abs(plain["chain_information"])


def test_certain_chains_have_the_bias_of_miller():
    """(C - 1) / 2S, from counts: 2 answers, each chain certain of its own."""
    certain = Prediction(["a", "b"], torch.eye(2).double().log(), torch.tensor([[0.4], [0.6]]).double().log())
    certain = Prediction(certain.names, certain.log_probs[..., None], certain.log_weights)
    assert bias([certain], 100, "split")["entropy"] == pytest.approx(-1 / 200, rel=0.02)
    assert abs(bias([certain], 100, "jackknife")["entropy"]) < 1e-4


def test_both_estimates_are_consistent():
    """Many draws of three members: within 5 standard errors, and the plug-in within its bias too."""
    g = torch.Generator().manual_seed(0)
    truth, S, runs = [normal(seed, 5) for seed in range(3)], 64, 500
    predictions = []
    for t in truth:
        drawn = torch.multinomial(t.log_weights[:, 0].exp(), S * runs, True, generator=g).view(S, runs)
        equal = torch.full((S, runs), 1 / S, dtype=torch.float64).log()
        predictions.append(Prediction(t.names, t.log_probs[:, drawn, 0], equal))
    found = Ensemble.of(predictions)
    exact = Ensemble.of(truth).split()
    for values, at in zip(found.jackknife(), exact, strict=True):
        within(values, at[0])
    slack = sum(first_order(t) for t in truth) / 3 / S
    for values, at in zip(found.split(), exact, strict=True):
        assert abs(float(values.mean() - at[0])) < 5 * float(values.std()) / runs**0.5 + 1.1 * slack


def test_weighted_draws_are_left_out_with_their_weights():
    """The jackknife by plain loops over the particles that are left out."""
    predictions = [table(seed, 3, n, 1) for seed, n in ((7, 4), (8, 5))]
    found, whole = Ensemble.of(predictions).jackknife(), Ensemble.of(predictions).split()
    expected = [float(t) for t in whole]
    for j, p in enumerate(predictions):
        S = len(p.log_weights)
        for i in range(S):
            rest = [k for k in range(S) if k != i]
            fewer = Prediction(p.names, p.log_probs[:, rest], p.log_weights[rest].log_softmax(0))
            without = Ensemble.of([fewer if k == j else q for k, q in enumerate(predictions)]).split()
            for n, (t, t_i) in enumerate(zip(whole, without, strict=True)):
                expected[n] -= (S - 1) / S * float(t_i - t)
    assert [float(t) for t in found] == pytest.approx(expected, abs=1e-9)


# -- of posteriors -----------------------------------------------------------------------------------------------------


def program(slope: float):
    def model(y=None):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Categorical(torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])))
            logits = torch.stack([torch.zeros(z.shape), slope * (z - 1.0)], -1)
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return model


def test_members_are_predictions_of_any_program():
    """p(y | x) of three models by `Posterior.predict`: enumerated, and by draws of the prior."""
    answers, slopes = torch.arange(2), (0.5, 1.0, 4.0)
    pyro.set_rng_seed(0)
    n, exact, drawn = 20_000, [], []
    for slope in slopes:
        model = program(slope)
        posterior = Importance(model, num_particles=n).run()
        drawn.append(posterior.predict(model, answers[:, None], sampler="prior", num_particles=n))
        prior = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]).T
        p = (slope * (torch.arange(3) - 1.0)).sigmoid()
        log_p = torch.stack([1 - p, p]).log()[..., None].expand(2, 3, 2)
        exact.append(Prediction(["0", "1"], log_p, prior.log()))
    for part, a, b in zip(PARTS, Ensemble.of(drawn).split(), Ensemble.of(exact).split(), strict=True):
        assert a.tolist() == pytest.approx(b.tolist(), abs=0.01), part
    assert Enumeration(program(1.0)).run(torch.zeros(2)).log_evidence.isfinite().all()


def test_bad_members():
    one = table(0, 2, 3, 2)
    for given_, weights, said in (
        ([], None, "there are none"),
        ([one, Prediction(["a", "c"], one.log_probs, one.log_weights)], None, "candidates differ"),
        ([one, table(0, 2, 3, 3)], None, r"plates differ, \(2,\) and \(3,\)"),
        ([one, one], torch.tensor([1.0]), "weights: expected 2"),
        ([one, one], torch.tensor([1.0, 0.0]), "weights: expected 2"),
        ([one, one], torch.tensor([1.0, torch.nan]), "weights: expected 2"),
    ):
        with pytest.raises(ValueError, match=said):
            Ensemble.of(given_, weights)
    nothing = Prediction(one.names, torch.full_like(one.log_probs, -torch.inf), one.log_weights)
    with pytest.raises(ZeroEvidence):
        Ensemble.of([nothing, nothing]).split()
    with pytest.raises(ZeroEvidence):
        Ensemble.of([Prediction(one.names, one.log_probs, torch.full_like(one.log_weights, -torch.inf))])
    assert all(bool(t.isfinite().all()) for t in Ensemble.of([one, nothing]).split())
    with pytest.raises(ValueError, match=r"two particles with weight; its members have \[3, 1\]"):
        Ensemble.of([one, table(0, 2, 1, 2)]).jackknife()
