"""The baselines: each gradient is the formula's, each training ends where mathematics says, and trainers keep house."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import peft
import pyro
import pytest
import torch
from problems import PRIOR, PROBLEMS, SEEN, A, X, Y, adapted, lm_guide, one_text, texts_of
from reference import Law, Plain, tokens
from tables import Table
from tiny import tiny_lm
from torch import Tensor

from lmppl import LanguageModel, text
from lmppl.distributions import Completion
from lmppl.inference import (
    Enumeration,
    Importance,
    PolicyGradient,
    Prompting,
    ReweightedWakeSleep,
    SiteMismatch,
    SupervisedFineTuning,
    VarGrad,
    compare,
    dreams,
    few_shot,
)
from lmppl.inference.baselines import policy_gradient, reweighted_wake_sleep
from lmppl.inference.baselines.densities import Densities, Drawn, log_likelihood
from lmppl.inference.baselines.reweighted_wake_sleep import wake_loss
from lmppl.inference.weights import Plates


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_lm("gpt2", vocab=4, dtype=torch.float64)


def still(parameters, **kwargs) -> dict:
    """An optimiser that leaves the parameters where they are, and no clipping: a step's gradient stays to be read."""
    return {"optimizer": torch.optim.SGD(parameters, lr=0.0), "clip": math.inf, **kwargs}


def gradient(trainer, parameters, *args) -> list[Tensor]:
    trainer.step(*args)
    return [p.grad.clone() for p in parameters]


def close(found: list[Tensor], expected: list[Tensor], within: float = 1e-10) -> bool:
    return all((a - b).abs().max() < within for a, b in zip(found, expected, strict=True))


class One:
    """z ~ LM(a) of at most one token, y ~ LM(a z): four texts z, 13 texts y, and a guide with a logit for each pair."""

    def __init__(self, lm: LanguageModel, row: Tensor | None = None):
        self.lm, self.x, self.y = lm, X[0, :1], Y[:1]
        self.support = Completion(lm, self.x, max_tokens=1).enumerate_support()  # (4, 2)
        self.seen = texts_of(lm)  # (13, 3)
        with torch.no_grad():
            self.log_prior = Completion(lm, self.x, max_tokens=1).log_prob(self.support)
            follows = Completion(lm, lm.join(self.x, self.support), **SEEN)
            self.log_likelihoods = follows.log_prob(self.seen[:, None])  # (13, 4)
        self.log_likelihood = self.log_likelihoods[self.row(self.y)[0]]
        row = torch.tensor([0.3, -0.4, 0.1, 0.9], dtype=torch.float64) if row is None else row
        self.logits = row.repeat(13, 1).requires_grad_()
        self.args = (self.y,)

    def row(self, y: Tensor) -> Tensor:
        return (text.pad(y, 3)[..., None, :] == self.seen).all(-1).int().argmax(-1)

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", Completion(self.lm, self.x, max_tokens=1))
            pyro.sample("y", Completion(self.lm, self.lm.join(self.x, z), **SEEN), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", Table(self.lm, self.support, self.logits[self.row(y)]))

    def reward(self, kind: str, T: float) -> Tensor:
        joint = (self.log_prior + self.log_likelihood) / T
        return joint - self.log_prior if kind == "likelihood" else joint

    @property
    def posteriors(self) -> Tensor:
        """(13, 4), given every y."""
        return (self.log_prior + self.log_likelihoods).softmax(-1)

    def total_variations(self) -> Tensor:
        """(13,), of the guide to the posterior, given every y."""
        return (self.logits.detach().softmax(-1) - self.posteriors).abs().sum(-1) / 2

    def trainer(self, kind, lr: float = 0.2, **kwargs):
        return kind(self.model, self.guide, optimizer=torch.optim.Adam([self.logits], lr=lr), clip=10.0, **kwargs)

    def still(self, kind, **kwargs):
        return kind(self.model, self.guide, **still([self.logits], **kwargs))

    def expected_gradient(self, trainer, module, monkeypatch) -> Tensor:
        """Of the loss of two particles for one y, by enumerating all 16 pairs of draws."""
        at = self.row(self.y)[0]
        log_q = self.logits.detach()[at].log_softmax(-1)
        total = torch.zeros(4, dtype=torch.float64)
        for pair in product(range(4), repeat=2):
            rows = torch.tensor(pair)
            monkeypatch.setattr(module, "Drawn", partial(Drawn, values={"z": self.support[rows][:, None]}))
            total += log_q[rows].sum().exp() * gradient(trainer, [self.logits], self.y)[0][at]
        return total


def assert_frequencies(counts: Tensor, p: Tensor, n: int) -> None:
    """Each cell with 20 or more counts expected within 5 sigma, and all the rare ones together."""
    counts, p, rare = counts.flatten(), p.flatten().double(), (n * p < 20).flatten()
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    p = torch.cat([p[~rare], p[rare].sum()[None]])
    assert len(p) > 5 and ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1e-9).all()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_at_the_posterior_every_particle_weighs_the_evidence(lm, problem):
    """Plates, several texts, ordinary latents, factors: u = log Z, so all weights are 1/N and all advantages 0."""
    found = PROBLEMS[problem](lm)
    densities = Drawn(found.model, found.posterior(1.0), (), {}, 6).densities()
    exact = Importance(found.model, found.posterior(1.0), 3).run()  # of u that does not vary
    assert densities.u.shape == (6, *exact.log_evidence.shape)
    assert (densities.u - exact.log_evidence).abs().max() < 1e-8
    assert (densities.log_p <= densities.log_prior + 1e-9).all() or "far apart" in problem


# Policy gradients -----------------------------------------------------------------------------------------------------

TARGETS = [("likelihood", 1.0, 1.0), ("likelihood", 0.5, 1.0), ("likelihood", 1.0, 2.0), ("joint", 2.0, 1.0)]


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_on_the_elbo_it_is_vargrad_on_the_same_draws(lm, algorithm):
    """Matched KL, leave-one-out baseline: grad = N / (2 (N-1)) grad VarGrad; PPO of one epoch alike."""
    guide_lm = adapted(lm)
    found, guide, N = one_text(lm), lm_guide(guide_lm), 7
    parameters = guide_lm.trainable_parameters()
    pyro.set_rng_seed(0)
    loss = VarGrad(num_particles=N).differentiable_loss(found.model, guide)
    expected = [g * N / (2 * (N - 1)) for g in torch.autograd.grad(loss, parameters)]
    assert max(g.abs().max() for g in expected) > 0.1
    pyro.set_rng_seed(0)
    trainer = PolicyGradient(
        found.model, guide, num_particles=N, algorithm=algorithm, epochs=1, **still(parameters)
    )  # fmt: skip
    assert close(gradient(trainer, parameters), expected)


@pytest.mark.parametrize(("reward", "kl", "T"), [*TARGETS, ("joint", 0.0, 1.0), ("likelihood", 0.0, 1.0)])
@pytest.mark.parametrize("baseline", ["leave-one-out", None])
def test_the_expected_gradient_is_the_objectives(lm, reward, kl, T, baseline, monkeypatch):
    """All 16 pairs of draws: E grad = grad of -(E_q R - kl KL(q || prior)), written out over the four texts."""
    one = One(lm)
    settings = {"reward": reward, "kl": kl, "reward_temperature": T, "baseline": baseline, "num_particles": 2}
    found = one.expected_gradient(one.still(PolicyGradient, **settings), policy_gradient, monkeypatch)
    logits = one.logits.detach()[0].requires_grad_()
    log_q = logits.log_softmax(-1)
    objective = (log_q.exp() * (one.reward(reward, T) - kl * (log_q - one.log_prior))).sum()
    (expected,) = torch.autograd.grad(-objective, logits)
    assert expected.abs().max() > 0.01 and close([found], [expected])


@pytest.mark.parametrize(("reward", "kl", "T"), TARGETS)
def test_the_optimum_is_the_prior_times_the_exponential_reward(lm, reward, kl, T, monkeypatch):
    one = One(lm)
    target = one.log_prior + one.reward(reward, T) / kl
    if (reward, kl) == ("likelihood", 1.0):  # matched: the posterior, tempered as a whole
        assert torch.allclose(target, (one.log_prior + one.log_likelihood) / T)
    one = One(lm, target)
    settings = {"reward": reward, "kl": kl, "reward_temperature": T, "num_particles": 2}
    trainer = one.still(PolicyGradient, **settings)
    assert one.expected_gradient(trainer, policy_gradient, monkeypatch).abs().max() < 1e-10


def test_the_loss_is_minus_the_elbo(lm):
    one = One(lm)
    metrics = one.still(PolicyGradient, num_particles=2000).step(one.y)
    log_q = one.logits.detach()[0].log_softmax(-1)
    u = one.log_prior + one.log_likelihood - log_q
    elbo, square = (log_q.exp() * u).sum(), (log_q.exp() * u**2).sum()
    assert abs(metrics["loss"] + elbo) < 5 * ((square - elbo**2) / 2000).sqrt()
    assert metrics["loss"] == pytest.approx(metrics["kl"] - metrics["reward"])


def test_ppo_is_three_clipped_ascents_on_the_same_draws(lm, monkeypatch):
    """Against a plain loop over samples and epochs; large steps, so that ratios leave the interval."""
    rows, epsilon, rate = [0, 1, 1, 3, 3], 0.2, 0.7
    one, plain = One(lm), One(lm).logits[0].tolist()
    values = {"z": one.support[torch.tensor(rows)][:, None]}
    monkeypatch.setattr(policy_gradient, "Drawn", partial(Drawn, values=values))
    settings = {"algorithm": "ppo", "epochs": 3, "clip_ratio": epsilon, "num_particles": 5, "clip": math.inf}
    optimizer = torch.optim.SGD([one.logits], lr=rate)
    metrics = PolicyGradient(one.model, one.guide, optimizer=optimizer, **settings).step(one.y)

    def q(logits: list[float]) -> list[float]:
        total = sum(math.exp(x) for x in logits)
        return [math.exp(x) / total for x in logits]

    old = q(plain)
    signal = [float(one.log_prior[k] + one.log_likelihood[k]) - math.log(old[k]) for k in rows]
    advantage = [s - (sum(signal) - s) / 4 for s in signal]
    clipped = 0
    for _ in range(3):
        now, ascent, clipped = q(plain), [0.0] * 4, 0
        for k, a in zip(rows, advantage, strict=True):
            ratio = now[k] / old[k]
            if (a > 0 and ratio > 1 + epsilon) or (a < 0 and ratio < 1 - epsilon):
                clipped += 1  # the minimum is the constant: no gradient
                continue
            for j in range(4):
                ascent[j] += a * ratio * ((j == k) - now[j]) / 5
        plain = [x + rate * g for x, g in zip(plain, ascent, strict=True)]
    assert clipped > 0 and metrics["clipped"] > 0
    assert one.logits[one.row(one.y)[0]].tolist() == pytest.approx(plain, abs=1e-10)


def test_whitened_advantages_have_unit_variance_in_each_plate_element(lm):
    trainer = One(lm).still(PolicyGradient, whiten=True)
    signal = torch.randn(6, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 100.0])
    found = trainer.advantages(signal)
    assert torch.allclose(found.mean(0), torch.zeros(3).double(), atol=1e-9)
    assert torch.allclose(found.var(0, correction=0), torch.ones(3).double(), atol=1e-6)


def test_a_reward_of_zero_is_the_floor(lm):
    """Zero likelihood counts 50 nats below the largest reward, or as the smallest positive one; all zero: as -50."""
    trainer = One(lm).still(PolicyGradient)
    inf = math.inf
    log_p = torch.tensor([[-3.0, -3.0, -inf], [-5.0, -90.0, -inf], [-inf, -inf, -inf]])
    log_prior = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0], [-40.0, -inf, -1.0]])
    expected = torch.tensor([[-2.0, -2.0, -50.0], [-3.0, -88.0, -50.0], [-52.0, -88.0, -50.0]])
    densities = Densities(log_p, log_prior, torch.zeros(3, 3), Plates((), (), (3,), 1))
    assert torch.equal(trainer.rewards(densities), expected)


# Reweighted wake-sleep ------------------------------------------------------------------------------------------------


def test_the_wake_gradient_is_the_plain_formula(lm):
    """-sum_n w_n grad log q(z_n): weights by one text at a time through the network, in Python."""
    guide_lm = adapted(lm)
    found, guide, N = one_text(lm), lm_guide(guide_lm), 5
    parameters = guide_lm.trainable_parameters()
    pyro.set_rng_seed(0)
    drawn = Drawn(found.model, guide, (), {}, N).values["z"]  # (5, 2, E)
    pyro.set_rng_seed(0)
    trainer = ReweightedWakeSleep(found.model, guide, num_particles=N, **still(parameters))
    metrics = trainer.step()
    plain, expected = Plain(lm), torch.zeros((), dtype=torch.float64)
    log_q = Completion(guide_lm, X, **PRIOR).log_prob(drawn)
    q = log_q.detach().exp()
    for i in range(2):
        x, w = tokens(X[i]), []
        for n in range(N):
            z = tokens(drawn[n, i])
            seen = Law(plain, x + z[:-1], SEEN["max_tokens"]).log_prob(tokens(Y[i]))
            w.append(math.exp(Law(plain, x, PRIOR["max_tokens"]).log_prob(z) + seen) / q[n, i].item())
        for n in range(N):
            expected = expected - w[n] / sum(w) * log_q[n, i] / 2
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    found_grad = [p.grad for p in parameters]
    assert close(found_grad, list(torch.autograd.grad(expected, parameters)), 1e-6)


def test_the_wake_gradient_vanishes_at_the_posterior_and_only_there(lm, monkeypatch):
    at = One(lm).log_prior + One(lm).log_likelihood
    for shift, vanishes in ((0.0, True), (0.5, False)):
        one = One(lm, at + shift * torch.tensor([1.0, 0.0, -1.0, 0.0]))
        trainer = one.still(ReweightedWakeSleep, num_particles=2)
        found = one.expected_gradient(trainer, reweighted_wake_sleep, monkeypatch)
        assert (found.abs().max() < 1e-10) == vanishes


def test_an_element_of_zero_weights_teaches_nothing():
    log_p = torch.tensor([[-1.0, -torch.inf], [-torch.inf, -torch.inf]])
    log_q = torch.tensor([[-2.0, -2.0], [-3.0, -3.0]], requires_grad=True)
    loss = wake_loss(Densities(log_p, log_p, log_q, Plates((), (), (2,), 1)))
    loss.sum().backward()
    assert loss.tolist() == [2.0, 0.0] and log_q.grad.tolist() == [[-1.0, 0.0], [0.0, 0.0]]


def test_dreams_are_draws_of_the_joint(lm):
    """Frequencies of (z, y') among 6000 dreams against p(z) p(y | z): cells of 20 or more expected, within 5 sigma."""
    n = 6000

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Completion(lm, x, **PRIOR))
            pyro.deterministic("what", z)
            pyro.sample("y", Completion(lm, lm.join(x, z), **SEEN), obs=y)

    x, y = X[1].expand(n, 2), Y[0].expand(n, 2)
    (same, dreamt), values = dreams(model)(x, y)
    assert same is x and list(values) == ["z"]
    support = texts_of(lm)
    z = support[:, None]
    joint = Completion(lm, X[1], **PRIOR).log_prob(z)
    joint = (joint + Completion(lm, lm.join(X[1], z), **SEEN).log_prob(support)).exp().detach()  # (z, y)
    rows = [(text[:, None] == support).all(-1).int().argmax(-1) for text in (values["z"], dreamt)]
    counts = torch.zeros_like(joint).index_put_(tuple(rows), torch.ones(n, dtype=torch.float64), accumulate=True)
    assert joint.sum() == pytest.approx(1.0)
    assert_frequencies(counts, joint, n)


def test_the_sleep_loss_is_the_log_likelihood_of_the_dream():
    task = Task(dtype=torch.float64)
    dreamt = (task.args[0], task.lm.encode(["ab", "c"], stop="eos"))
    z = task.lm.encode(["bb", ""], stop="eos")
    trainer = task.trainer(ReweightedWakeSleep, wake=0.0, sleep=2.0, simulate=lambda x, y: (dreamt, {"z": z}))
    expected = -task.q_of(*dreamt).log_prob(z).mean().item()
    metrics = trainer.step(*task.args)
    assert metrics["sleep"] == pytest.approx(expected, abs=1e-10)
    assert metrics["loss"] == pytest.approx(2 * expected, abs=1e-10)


# Training -------------------------------------------------------------------------------------------------------------


class Task:
    """z ~ LM(x), y ~ LM(x z): at most two tokens of z, two observations; the guide reads both ends."""

    def __init__(self, seed: int = 3, dtype: torch.dtype = torch.float32):
        self.lm = tiny_lm(seed=seed, dtype=dtype)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.q = self.lm.with_adapter(peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        self.args = (self.lm.encode(["abc", "d"]), self.lm.encode(["cab", "ed"], stop="eos"))

    def model(self, x, y):
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", Completion(self.lm, x, max_tokens=2))
            pyro.sample("y", Completion(self.lm, self.lm.join(x, z), max_tokens=4), obs=y)

    def q_of(self, x, y) -> Completion:
        return Completion(self.q, self.q.join(y, x), max_tokens=2)

    def guide(self, x, y):
        with pyro.plate("stories", len(x)):
            pyro.sample("z", self.q_of(x, y))

    def trainer(self, kind, lr: float = 1e-2, **kwargs):
        optimizer = torch.optim.AdamW(self.q.trainable_parameters(), lr=lr)
        return kind(self.model, self.guide, optimizer=optimizer, **kwargs)


def told(one: One, n: int = 16):
    """Batches of supervised fine-tuning: n fresh draws of the exact posterior of each observation."""

    def batches(step: int):
        y = Y.repeat(n, 1)
        return y, {"z": one.support[torch.multinomial(one.posteriors[one.row(y)], 1)[:, 0]]}

    return batches


TRAINERS = {
    "REINFORCE": {"kind": PolicyGradient},
    "PPO": {"kind": PolicyGradient, "algorithm": "ppo"},
    "wake": {"kind": ReweightedWakeSleep},
    "supervised": {"kind": SupervisedFineTuning},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_training_reaches_the_exact_posterior(lm, name):
    """Two observations, 16 particles, 80 steps (PPO: of 4 epochs): from a TV above 0.4 to below 0.06."""
    one = One(lm)
    at = one.row(Y)
    assert float(one.total_variations()[at].min()) > 0.4
    trainer = one.trainer(**TRAINERS[name])
    trainer.fit(told(one) if name == "supervised" else [(Y,)], 80, warmup=5, progress=False)
    assert float(one.total_variations()[at].max()) < 0.06
    answers = []
    for algorithm in (trainer, Importance(one.model, one.guide)):
        pyro.set_rng_seed(1)
        answers.append(algorithm.run(Y))
    assert torch.equal(answers[0].log_weights, answers[1].log_weights)


def test_sleep_reaches_the_posterior_of_every_dream(lm):
    """On average over y ~ p; 64 dreams a step."""
    one = One(lm)
    p_y = (one.log_prior + one.log_likelihoods).exp().sum(-1)
    assert float(p_y.sum()) == pytest.approx(1.0) and float((p_y * one.total_variations()).sum()) > 0.35
    trainer = one.trainer(ReweightedWakeSleep, wake=0.0, sleep=1.0, simulate=dreams(one.model))
    trainer.fit([(Y[:1].repeat(64, 1),)], 80, warmup=5, progress=False)
    assert float((p_y * one.total_variations()).sum()) < 0.06


def test_reward_only_collapses_on_a_mode(lm):
    """kl=0: the expected reward exceeds the posterior's own, the entropy is lost, and q is far from the posterior."""
    one = One(lm)
    trainer = one.trainer(PolicyGradient, algorithm="ppo", reward="joint", kl=0.0)
    trainer.fit([(one.y,)], 50, warmup=5, progress=False)
    at = one.row(one.y)[0]
    p, q = one.posteriors[at], one.logits.detach()[at].softmax(-1)
    entropy, reward = [-(x * x.log()).sum() for x in (p, q)], [(x * one.reward("joint", 1.0)).sum() for x in (p, q)]
    assert entropy[0] > 1.0 and entropy[1] < 0.1
    assert reward[1] > reward[0] + 0.3
    assert one.total_variations()[at] > 0.45


# Supervised fine-tuning -----------------------------------------------------------------------------------------------


def test_supervised_loss_is_the_mean_cross_entropy():
    task = Task(dtype=torch.float64)
    z = task.lm.encode(["b", "ab"], stop="eos")
    expected = -task.q_of(*task.args).log_prob(z).mean().item()
    default = task.trainer(SupervisedFineTuning).step(*task.args, {"z": z})
    assert default["loss"] == pytest.approx(expected, abs=1e-10)
    task = Task(dtype=torch.float64)
    split = task.trainer(SupervisedFineTuning, examples=lambda x, z, y: ((x, y), {"z": z}))
    assert split.step(task.args[0], z, task.args[1])["loss"] == pytest.approx(expected, abs=1e-10)


def test_values_that_do_not_fit_the_guide_are_refused():
    task = Task()
    z = task.lm.encode(["b", "ab"], stop="eos")
    for values, name in (({}, "'z'"), ({"z": z, "w": z}, "'w'")):
        with pytest.raises(SiteMismatch, match=name):
            log_likelihood(task.guide, task.args, {}, values)
    with pytest.raises(ValueError, match="stop token"):
        log_likelihood(task.guide, task.args, {}, {"z": task.lm.encode(["abc", "a"], stop="eos")})


# Prompting ------------------------------------------------------------------------------------------------------------


def test_prompting_answers_with_its_draws_alone():
    task = Task()
    exact = Enumeration(task.model).run(*task.args)
    n = 4000
    before = task.lm.tokens_scored
    posterior = Prompting(task.model, task.guide, n).run(*task.args)
    asked = task.lm.tokens_scored - before
    with torch.no_grad():
        q = task.q_of(*task.args).log_prob(exact.values["z"]).exp()  # (K, 2)
    assert posterior.log_evidence.isnan().all() and torch.allclose(posterior.probabilities, torch.tensor(1 / n))
    counts = (posterior.samples["z"][:, None] == exact.values["z"][None]).all(-1).double().sum(0)
    for i in range(2):
        assert_frequencies(counts[:, i], q[:, i], n)
    before = task.lm.tokens_scored
    task.q_of(*task.args).expand((n, 2)).sample()
    assert asked == task.lm.tokens_scored - before  # the model's own densities cost nothing
    again = posterior.resample(50)
    assert torch.allclose(again.probabilities, torch.tensor(1 / 50))
    assert sum(p for _, p in posterior.table("z", index=0)) == pytest.approx(1.0)


def test_weighted_prompting_is_importance_sampling():
    task = Task()
    answers = []
    for algorithm in (Prompting(task.model, task.guide, 20, weighted=True), Importance(task.model, task.guide, 20)):
        pyro.set_rng_seed(1)
        answers.append(algorithm.run(*task.args))
    assert torch.equal(answers[0].log_weights, answers[1].log_weights)
    assert torch.equal(answers[0].samples["z"], answers[1].samples["z"])


def test_compare_takes_draws_without_evidence():
    task = Task()
    exact = Enumeration(task.model)
    row = compare(task.model, {"prompted": Prompting(task.model, task.guide, 500)}, *task.args, exact=exact)["prompted"]
    assert row.log_evidence is None and row.log_evidence_error is None
    assert not row.training_tokens and row.query_tokens > 0
    noise = 0.5 * math.sqrt(len(exact.run(*task.args).log_weights) / 500)  # E TV of N draws <= sqrt(K / N) / 2
    assert row.draws_tv == pytest.approx(row.density_tv, abs=2 * noise)


def test_few_shot_puts_answered_questions_first(lm):
    template = few_shot("{x} {{?}} ", [({"x": "b"}, "{a}"), ({"x": "a"}, ".")], separator="\n")
    assert template.format(x="X") == "b {?} {a}\na {?} .\nX {?} "
    short = few_shot("{x}.", [({"x": "a"}, "b")], separator="")
    assert lm.decode(lm.fill(short, x=torch.tensor([[A], [A + 1]]))) == ["a.ba.", "a.bb."]
    for examples in ([], [({"y": "b"}, "a")]):
        with pytest.raises(ValueError, match="examples"):
            few_shot("{x}", examples)


# The contract of trainers ---------------------------------------------------------------------------------------------

EVERY = {
    **TRAINERS,
    "sleep": {"kind": ReweightedWakeSleep, "wake": 0.5, "sleep": 0.5},
    "dreamt examples": {"kind": SupervisedFineTuning},
}


def made(name: str, task: Task):
    found = {"sleep": {"simulate": dreams(task.model)}, "dreamt examples": {"examples": dreams(task.model)}}
    return task.trainer(**EVERY[name], **found.get(name, {}))


def batch_of(name: str, task: Task):
    z = task.lm.encode(["b", "ab"], stop="eos")
    return (*task.args, {"z": z}) if name == "supervised" else task.args


@pytest.mark.parametrize("name", EVERY)
def test_a_resumed_run_repeats_an_uninterrupted_one(name, tmp_path):
    whole, first, second = Task(), Task(), Task()
    settings = {"progress": False, "seed": 5}
    expected = made(name, whole).fit([batch_of(name, whole)], 4, **settings)

    def interrupt(step, metrics):
        if step == 2:
            raise KeyboardInterrupt

    settings |= {"checkpoint": tmp_path / "c", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        made(name, first).fit([batch_of(name, first)], 4, callback=interrupt, **settings)
    rest = made(name, second).fit([batch_of(name, second)], 4, **settings)
    assert rest == expected[2:]
    for a, b in zip(whole.q.trainable_parameters(), second.q.trainable_parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", EVERY)
def test_training_tokens_count_what_went_through_the_network(name):
    task = Task()
    trainer = made(name, task)
    trainer.step(*batch_of(name, task))
    before, counted = task.lm.tokens_scored, trainer.training_tokens
    trainer.step(*batch_of(name, task))
    assert trainer.training_tokens - counted == task.lm.tokens_scored - before > 0


@pytest.mark.parametrize("name", ["REINFORCE", "PPO", "wake", "sleep"])
def test_a_loss_that_is_not_finite_updates_nothing(name):
    task = Task()
    trainer = made(name, task)
    before = [p.clone() for p in task.q.trainable_parameters()]

    def model(x, y):
        with pyro.plate("stories", len(x)):
            pyro.sample("z", Completion(task.lm, x, max_tokens=2))
            pyro.factor("f", torch.full((len(x),), float("inf")))

    trainer.model = model
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        trainer.step(*task.args)
    assert all(torch.equal(a, b) for a, b in zip(before, task.q.trainable_parameters(), strict=True))


def observes_elsewhere(t: Task):
    def model(x, y):
        with pyro.plate("stories", len(x)):
            z = pyro.sample("z", Completion(t.lm, x, max_tokens=2))
            pyro.sample("y", Completion(t.lm, t.lm.join(x, z), max_tokens=4), obs=y.clone())

    return dreams(model)(*t.args)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda t: t.trainer(ReweightedWakeSleep, sleep=0.5), "simulate"),
        (lambda t: t.trainer(ReweightedWakeSleep, wake=0.0), "wake"),
        (lambda t: t.trainer(ReweightedWakeSleep, wake=-1.0), "wake"),
        (lambda t: t.trainer(ReweightedWakeSleep, num_particles=0), "num_particles"),
        (lambda t: t.trainer(PolicyGradient, algorithm="a2c"), "algorithm"),
        (lambda t: t.trainer(PolicyGradient, reward="bleu"), "reward"),
        (lambda t: t.trainer(PolicyGradient, baseline="value"), "baseline"),
        (lambda t: t.trainer(PolicyGradient, kl=-0.1), "kl"),
        (lambda t: t.trainer(PolicyGradient, epochs=2), "epochs"),
        (lambda t: t.trainer(PolicyGradient, algorithm="ppo", epochs=0), "epochs"),
        (lambda t: t.trainer(PolicyGradient, clip_ratio=0.0), "clip_ratio"),
        (lambda t: t.trainer(PolicyGradient, num_particles=1), "num_particles"),
        (lambda t: t.trainer(PolicyGradient, reward_temperature=0.0), "reward_temperature"),
        (lambda t: t.trainer(SupervisedFineTuning).step(*t.args), "examples"),
        (lambda t: Prompting(t.model, t.guide, 0), "num_particles"),
        (lambda t: Prompting(t.model, t.guide).run(*t.args, num_particles=0), "num_particles"),
        (observes_elsewhere, "simulate"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call(Task())
