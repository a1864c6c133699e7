"""Variational EM: its gradient is the likelihood's, it climbs, each step moves its own parameters alone."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import combinations

import peft
import pyro
import pytest
import torch
from tiny import tiny_lm
from torch import Tensor

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import (
    SMC,
    Enumeration,
    GFlowNet,
    Importance,
    MetropolisHastings,
    Replay,
    ReweightedWakeSleep,
    VariationalEM,
)

CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SIZE = {"max_tokens": 2}
SGD, ADAM = torch.optim.SGD, torch.optim.Adam


def adapter(lm: LanguageModel, seed: int, std: float = 0.1) -> LanguageModel:
    view = lm.with_adapter(peft.LoraConfig(**CONFIG))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in view.trainable_parameters():
            p.normal_(std=std, generator=generator)
    return view


class Task:
    """z ~ p(x), y ~ p(x z) for three observations, guided by q(y x); p and q are adapters of one base."""

    def __init__(self, x=("ab", "b", "ca"), y=("cb", "", "a")) -> None:
        self.lm = tiny_lm(vocab=5, seed=3, dtype=torch.float64)
        self.p, self.q = adapter(self.lm, 1), adapter(self.lm, 2)
        self.args = (self.lm.encode(list(x)), self.lm.encode(list(y), stop="eos"))

    def model(self, x, y, subsample=None, subsample_size=None):
        with pyro.plate("data", len(x), subsample=subsample, subsample_size=subsample_size) as i:
            z = pyro.sample("z", Completion(self.p, x[i], **SIZE))
            pyro.sample("y", Completion(self.p, self.p.join(x[i], z), **SIZE), obs=y[i])

    def guide(self, x, y, subsample=None, subsample_size=None):
        with pyro.plate("data", len(x), subsample=subsample, subsample_size=subsample_size) as i:
            pyro.sample("z", Completion(self.q, self.q.join(y[i], x[i]), **SIZE))

    @property
    def theta(self) -> list[Tensor]:
        return self.p.trainable_parameters()

    @property
    def phi(self) -> list[Tensor]:
        return self.q.trainable_parameters()

    def gflownet(self, lr: float = 1e-2, **kwargs) -> GFlowNet:
        return GFlowNet(self.model, self.guide, optimizer=torch.optim.AdamW(self.phi, lr=lr), **kwargs)

    def log_joint(self) -> Tensor:
        """log p(z, y) (K, data) over the support, with gradient."""
        x, y = self.args
        z = Completion(self.p, x, **SIZE).enumerate_support()
        return Completion(self.p, x, **SIZE).log_prob(z) + Completion(self.p, self.p.join(x, z), **SIZE).log_prob(y)

    def log_likelihood(self) -> float:
        with torch.no_grad():
            return self.log_joint().logsumexp(0).sum().item()

    def gradient(self, value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, self.theta)])

    def still(self, e_step, **kwargs) -> VariationalEM:
        """An M-step that finds its gradient and does not move."""
        guide = getattr(e_step, "guide", None)
        return VariationalEM(self.model, guide, e_step, SGD(self.theta, lr=0.0), **kwargs)

    def ascent(self, em: VariationalEM, *args, **kwargs) -> Tensor:
        """The gradient of Q that a round finds."""
        em.step(*(args or self.args), **kwargs)
        return -torch.cat([p.grad.flatten() for p in self.theta])


@pytest.mark.parametrize("max_particles", [256, 8])
def test_with_the_exact_posterior_the_gradient_is_the_likelihoods(max_particles):
    task = Task()
    expected = task.gradient(task.log_joint().logsumexp(0).sum())
    found = task.ascent(task.still(Enumeration(task.model), max_particles=max_particles))
    assert float((found - expected).abs().max()) < 1e-8 < 1e-2 < float(expected.abs().max())


def test_metrics_with_the_exact_posterior():
    task = Task()
    metrics = task.still(Enumeration(task.model)).step(*task.args)
    with torch.no_grad():
        log_joint = task.log_joint()
    expected = task.log_likelihood()
    assert metrics["log_evidence"] == pytest.approx(expected, abs=1e-10) and metrics["gap"] == 0
    assert metrics["elbo"] == metrics["log_evidence"]
    surrogate = (log_joint.softmax(0) * log_joint).sum().item()
    assert metrics["surrogate"] == pytest.approx(surrogate, abs=1e-10) and metrics["loss"] == -metrics["surrogate"]


def test_a_value_of_weight_zero_has_no_gradient_not_even_nan():
    """A factor log(s * 0) for half of the values: its own derivative is 0/0."""
    task = Task()
    s = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    x, y = task.args

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", Completion(task.p, x, **SIZE))
            pyro.sample("y", Completion(task.p, task.p.join(x, z), **SIZE), obs=y)
            pyro.factor("f", (s * (z[..., 0] != 2).double()).log())

    em = VariationalEM(model, None, Enumeration(model), SGD([*task.theta, s], lr=0.0))
    em.step()
    z = Completion(task.p, x, **SIZE).enumerate_support()
    expected = task.gradient(task.log_joint().masked_fill(z[..., 0] == 2, -torch.inf).logsumexp(0).sum())
    found = -torch.cat([p.grad.flatten() for p in task.theta])
    assert float((found - expected).abs().max()) < 1e-8
    assert -s.grad.item() == pytest.approx(3 / 0.7, abs=1e-8)


def test_an_observation_that_is_impossible_teaches_nothing():
    task = Task()
    x, y = task.args

    def model(x, y):
        with pyro.plate("data", 3):
            z = pyro.sample("z", Completion(task.p, x, **SIZE))
            pyro.sample("y", Completion(task.p, task.p.join(x, z), **SIZE), obs=y)
            pyro.factor("f", torch.tensor([0.0, -torch.inf, 0.0], dtype=torch.float64))

    em = VariationalEM(model, None, Enumeration(model), SGD(task.theta, lr=0.0))
    found = task.ascent(em)
    expected = task.gradient(task.log_joint().logsumexp(0)[[0, 2]].sum())
    assert float((found - expected).abs().max()) < 1e-8


# -- mini-batches ------------------------------------------------------------------------------------------------------


def test_subsamples_given_average_to_the_gradient_of_all_data():
    task = Task()
    em = task.still(Enumeration(task.model))
    pairs = [torch.tensor(pair) for pair in combinations(range(3), 2)]
    mean = torch.stack([task.ascent(em, *task.args, subsample=pair) for pair in pairs]).mean(0)
    expected = task.gradient(task.log_joint().logsumexp(0).sum())
    assert float((mean - expected).abs().max()) < 1e-8
    full = em.step(*task.args)
    parts = [em.step(*task.args, subsample=pair) for pair in pairs]
    for name in ("surrogate", "log_evidence"):
        assert sum(m[name] for m in parts) / 3 == pytest.approx(full[name], abs=1e-8)


@pytest.mark.parametrize("kind", ["enumeration", "gflownet"])
def test_a_subsample_that_the_plate_draws_is_one_for_inference_and_m_step(kind):
    task = Task()
    e_step = Enumeration(task.model) if kind == "enumeration" else task.gflownet(lr=0.0)
    em = task.still(e_step, num_particles=64, exact=Enumeration(task.model))
    log_evidence = task.log_joint().logsumexp(0).detach()
    sums = {pair: 1.5 * log_evidence[list(pair)].sum().item() for pair in combinations(range(3), 2)}
    gradients = {p: task.gradient(1.5 * task.log_joint().logsumexp(0)[list(p)].sum()) for p in sums}
    seen = set()
    for _ in range(12):
        metrics = em.step(*task.args, subsample_size=2)
        found = -torch.cat([p.grad.flatten() for p in task.theta])
        (pair,) = [p for p, value in sums.items() if abs(value - metrics["log_likelihood"]) < 1e-8]
        seen.add(pair)
        near = {p: float((found - g).norm() / g.norm()) for p, g in gradients.items()}
        assert near[pair] < (1e-8 if kind == "enumeration" else 0.5) and min(near, key=near.__getitem__) == pair
    assert len(seen) == 3


def test_a_subsampled_plate_that_leaves_a_latent_out_is_refused():
    task = Task()
    x, y = task.args

    def model():
        z = pyro.sample("z", Completion(task.p, x[0], **SIZE))
        with pyro.plate("data", 3, subsample_size=2) as i:
            pyro.sample("y", Completion(task.p, task.p.join(x[i], z[..., None, :]), **SIZE), obs=y[i])

    with pytest.raises(ValueError, match="plate 'data' is subsampled"):
        VariationalEM(model, None, Importance(model), SGD(task.theta, lr=0.0)).step()


# -- the E-steps -------------------------------------------------------------------------------------------------------

E_STEPS = {
    "SMC": lambda t: SMC(t.model, num_particles=400, ess_threshold=0.8),
    "Metropolis": lambda t: MetropolisHastings(t.model, num_chains=60, num_samples=1, warmup=12),
    "guide": lambda t: t.gflownet(lr=0.0, num_particles=2),
}


@pytest.mark.parametrize("name", E_STEPS)
def test_every_e_step_gives_the_gradient_of_the_likelihood(name):
    """The length of the gradient along the true one, whose bias of order 1/N is far below the standard error."""
    task = Task()
    expected = task.gradient(task.log_joint().logsumexp(0).sum())
    em = task.still(E_STEPS[name](task), num_particles=1000)
    along = torch.stack([task.ascent(em) @ expected / (expected @ expected) for _ in range(10)])
    error = along.std() / 10**0.5
    assert error < 0.03 and abs(along.mean() - 1) < 5 * error


def test_without_weights_the_gradient_is_the_elbos():
    task = Task()
    x, y = task.args
    em = task.still(task.gflownet(lr=0.0, num_particles=2), num_particles=200, weighted=False)
    log_joint = task.log_joint()
    z = Completion(task.p, x, **SIZE).enumerate_support()
    with torch.no_grad():
        log_q = Completion(task.q, task.q.join(y, x), **SIZE).log_prob(z)
    expected = task.gradient((log_q.exp() * log_joint).sum())
    other = task.gradient(task.log_joint().logsumexp(0).sum())
    along, metrics = [], []
    for _ in range(12):
        metrics.append(em.step(*task.args))
        found = -torch.cat([p.grad.flatten() for p in task.theta])
        along.append(found @ expected / (expected @ expected))
    error = torch.stack(along).std() / 12**0.5
    assert error < 0.05 and abs(torch.stack(along).mean() - 1) < 5 * error
    assert abs(other @ expected / (expected @ expected) - 1) > 5 * error  # the two gradients can be told apart
    elbo = (log_q.exp() * (log_joint - log_q)).sum().item()
    values = torch.tensor([m["elbo"] for m in metrics])
    assert abs(values.mean() - elbo) < 5 * values.std() / 12**0.5
    assert all(m["gap"] == pytest.approx(m["log_evidence"] - m["elbo"]) for m in metrics)


# -- climbing ----------------------------------------------------------------------------------------------------------


def test_exact_em_with_backtracking_never_falls():
    def rounds(n: int, backtrack: bool) -> tuple[list[float], list[dict[str, float]]]:
        task = Task()
        em = VariationalEM(task.model, None, Enumeration(task.model), SGD(task.theta, lr=0.3), backtrack=backtrack)
        metrics = [em.step(*task.args) for _ in range(n)]
        return [m["log_evidence"] for m in metrics] + [task.log_likelihood()], metrics

    values, metrics = rounds(20, backtrack=True)
    rise = torch.tensor(values).diff()
    assert float(rise.min()) > -1e-6 and float(rise[:3].min()) > 0.05
    assert sum(m["halvings"] for m in metrics) > 5
    gain = torch.tensor([m["gain"] for m in metrics])
    assert bool((gain >= 0).all()) and bool((rise - gain > -1e-6).all())  # the likelihood rises by at least Q's gain
    plain, _ = rounds(4, backtrack=False)
    assert float(torch.tensor(plain).diff().min()) < -0.1  # these steps are too long without it


def test_several_m_steps_climb_the_same_surrogate():
    task, other = Task(), Task()
    one = VariationalEM(task.model, None, Enumeration(task.model), SGD(task.theta, lr=0.01), backtrack=True)
    five = VariationalEM(
        other.model, None, Enumeration(other.model), SGD(other.theta, lr=0.01), backtrack=True, m_steps=5
    )
    a, b = one.step(*task.args), five.step(*other.args)
    assert b["gain"] > 2 * a["gain"] > 0
    with torch.no_grad():
        start = Task().log_joint()
        q = (start - start.logsumexp(0)).exp()
        assert (q * (other.log_joint() - start)).sum().item() == pytest.approx(b["gain"], abs=1e-9)


ENDS = {
    "exact": lambda t: Enumeration(t.model),
    "GFlowNet": lambda t: t.gflownet(),
    "wake-sleep": lambda t: ReweightedWakeSleep(t.model, t.guide, optimizer=ADAM(t.phi, lr=1e-2)),
    "SMC": lambda t: SMC(t.model, num_particles=32),
}


@cache
def end(name: str) -> float:
    """Nats an observation after 30 rounds: two prompts seen with two endings each, so that -log 2 is the best."""
    task = Task(x=["ab", "ab", "b", "b"], y=["cb", "", "a", "cb"])
    assert task.log_likelihood() / 4 < -4
    e_step = ENDS[name](task)
    em = VariationalEM(task.model, getattr(e_step, "guide", None), e_step, ADAM(task.theta, lr=3e-2))
    em.fit([task.args], 30, progress=False)
    return task.log_likelihood() / 4


@pytest.mark.parametrize("name", ["GFlowNet", pytest.param("wake-sleep", marks=pytest.mark.slow), "SMC"])
def test_amortised_and_sampled_em_end_near_exact_em(name):
    assert -0.8 < end("exact") < -math.log(2)
    assert abs(end(name) - end("exact")) < 0.1


# -- who moves what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gflownet", "wake-sleep"])
def test_each_step_moves_its_own_adapter_alone(kind):
    task = Task()
    optimizer = ADAM(task.phi, lr=1e-2)
    make = GFlowNet if kind == "gflownet" else ReweightedWakeSleep
    e_step = make(task.model, task.guide, optimizer=optimizer)
    em = VariationalEM(task.model, task.guide, e_step, ADAM(task.theta, lr=1e-2), e_steps=2)
    base = task.lm.trainable_parameters()
    moves: list[tuple[bool, bool]] = []  # (theta, phi), by step of an optimiser

    def watch(which: torch.optim.Optimizer) -> None:
        before: list[Tensor] = []

        def pre(*_):
            before[:] = [p.detach().clone() for p in [*task.theta, *task.phi, *base]]
            grads = [[p.grad is not None for p in group] for group in (task.theta, task.phi, base)]
            own = 0 if which is em.optimizer else 1
            assert all(grads[own]) and not any(grads[2])
            if which is not em.optimizer and not moves:
                assert not any(grads[0])  # before the first M-step theta has no gradient at all

        def post(*_):
            now = [*task.theta, *task.phi, *base]
            changed = [not torch.equal(a, b) for a, b in zip(before, now, strict=True)]
            n = len(task.theta)
            assert not any(changed[n + len(task.phi) :])
            moves.append((any(changed[:n]), any(changed[n : n + len(task.phi)])))

        which.register_step_pre_hook(pre)
        which.register_step_post_hook(post)

    watch(em.optimizer)
    watch(optimizer)
    held: list[Tensor] = []
    for _ in range(2):
        em.step(*task.args)
        held = [p.grad.clone() for p in task.phi]
    assert moves == [(False, True), (False, True), (True, False)] * 2
    surrogate_only = VariationalEM(task.model, None, Enumeration(task.model), em.optimizer)
    surrogate_only.step(*task.args)  # an M-step leaves the guide's gradients as they were
    assert all(torch.equal(p.grad, g) for p, g in zip(task.phi, held, strict=True))
    assert all(p.requires_grad for p in [*task.theta, *task.phi, *base])


def test_parameters_that_both_steps_would_move_are_refused():
    task = Task()
    e_step = task.gflownet()
    with pytest.raises(ValueError, match="m_optimizer: it holds parameters of the guide"):
        VariationalEM(task.model, task.guide, e_step, SGD(task.phi, lr=0.1)).step(*task.args)
    with pytest.raises(ValueError, match="m_optimizer: it holds parameters of the guide"):
        VariationalEM(task.model, task.guide, e_step, SGD(task.lm.trainable_parameters(), lr=0.1)).step(*task.args)
    wrong = GFlowNet(task.model, task.guide, optimizer=SGD(task.lm.trainable_parameters(), lr=0.1))
    with pytest.raises(ValueError, match="e_step: its optimizer holds parameters of the model"):
        VariationalEM(task.model, task.guide, wrong, SGD(task.theta, lr=0.1)).step(*task.args)
    stranger = SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)
    with pytest.raises(ValueError, match="m_optimizer: log p.* depends on none of its parameters"):
        VariationalEM(task.model, None, Enumeration(task.model), stranger).step(*task.args)


def test_replayed_rewards_are_forgotten_when_the_model_moves():
    task = Task()
    replay = Replay(capacity=8, fraction=0.5)
    e_step = task.gflownet(replay=replay, num_particles=8)
    em = VariationalEM(task.model, task.guide, e_step, SGD(task.theta, lr=0.5), e_steps=2)
    for _ in range(3):
        em.step(*task.args)
    seen = e_step._observations(task.model, task.guide, task.args, {})  # what the next E-step begins with
    entries = [entry for key in seen.keys for entry in replay._stored[key].values()]
    assert len(entries) > 6 and all(entry.log_p != entry.log_p for entry in entries)
    metrics = em.step(*task.args)
    assert metrics["e_replayed"] == 4


def test_replayed_rewards_are_those_of_the_model_as_it_is():
    """After a round that moved theta, an update of the guide knows no reward but today's, on what it replays too."""
    task = Task()
    replay = Replay(capacity=32, fraction=0.5)
    e_step = task.gflownet(replay=replay, num_particles=8)
    em = VariationalEM(task.model, task.guide, e_step, SGD(task.theta, lr=0.5))
    for _ in range(2):
        em.step(*task.args)
    before = task.log_joint().detach()
    em.step(*task.args)
    stored = {key: set(entries) for key, entries in replay._stored.items()}
    assert e_step.step(*task.args)["replayed"] == 4
    now, support = task.log_joint().detach(), Completion(task.p, task.args[0], **SIZE).enumerate_support()[:, 0]
    index = {tuple(t for t in z if t >= 0): k for k, z in enumerate(support.tolist())}
    again = 0
    for i, (key, entries) in enumerate(replay._stored.items()):
        for tokens, entry in entries.items():
            if math.isnan(entry.log_p):
                continue
            k = index[tuple(t for t in entry.values["z"].tolist() if t >= 0)]
            assert entry.log_p == pytest.approx(now[k, i].item(), abs=1e-6)
            again += tokens in stored[key] and abs(entry.log_p - before[k, i].item()) > 1e-3
    assert again >= 3 * 4  # every observation replays 4


def test_a_step_that_is_not_finite_moves_nothing():
    task = Task()

    def model(x, y):
        with pyro.plate("data", 3):
            pyro.sample("z", Completion(task.p, x, **SIZE))
            pyro.factor("f", torch.full((3,), torch.inf, dtype=torch.float64))

    before = [p.clone() for p in task.theta]
    em = VariationalEM(model, None, Importance(model), SGD(task.theta, lr=0.1))
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        em.step(*task.args)
    assert all(torch.equal(a, b) for a, b in zip(before, task.theta, strict=True))


# -- fit ---------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    def em(task: Task) -> VariationalEM:
        e_step = task.gflownet(replay=Replay(fraction=0.5), num_particles=8, exploration="default")
        return VariationalEM(task.model, task.guide, e_step, ADAM(task.theta, lr=1e-2), e_steps=2)

    whole, first, second = Task(), Task(), Task()
    expected = em(whole).fit([whole.args], 6, progress=False, seed=5)

    def stop_in_4(step, metrics):
        if step == 3:
            raise KeyboardInterrupt

    where = {"checkpoint": tmp_path / "c", "checkpoint_every": 2, "log": tmp_path / "run.jsonl", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        em(first).fit([first.args], 6, seed=5, callback=stop_in_4, **where)
    resumed = em(second)
    rest = resumed.fit([second.args], 6, seed=5, held_out=second.args, evaluate_every=6, **where)
    keys = expected[0].keys()
    assert {"surrogate", "elbo", "log_evidence", "gap", "e_loss", "e_replayed"} <= keys
    assert [{k: m[k] for k in keys} for m in rest] == expected[2:]
    for a, b in zip([*whole.theta, *whole.phi], [*second.theta, *second.phi], strict=True):
        assert torch.equal(a, b)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [o.param_groups[0]["lr"] for o in resumed.optimizers] == [1e-2, 1e-2]
    # 64 draws of a guide: the held-out evidence lies near the exact one.
    assert abs(rest[-1]["held_out_log_evidence"] - second.log_likelihood()) < 0.5 and rest[-1]["held_out_ess"] > 0.3


def test_a_guide_that_sees_y_teaches_a_model_to_predict_it():
    """y follows x in the alphabet 85 times in 100, else any other letter; 60 pairs to learn from, 100 to predict."""
    lm = tiny_lm(vocab=6, seed=3, dtype=torch.float64)
    p, q = adapter(lm, 1), adapter(lm, 2)
    generator = torch.Generator().manual_seed(0)
    letters = list("abcd")
    code = torch.randint(4, (160,), generator=generator)
    shift = torch.multinomial(torch.tensor([0.05, 0.85, 0.05, 0.05]), 160, replacement=True, generator=generator)
    x, y = lm.encode([letters[i] for i in code]), lm.encode([letters[i] for i in (code + shift) % 4])
    entropy = -0.85 * math.log(0.85) - 0.15 * math.log(0.05)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Completion(p, x, max_tokens=1))
            pyro.sample("y", Completion(p, p.join(x, z), max_tokens=1, stop=None), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Completion(q, q.join(y, x), max_tokens=1))

    def held_out() -> float:
        """The mean exact log p(y | x) of unseen pairs."""
        return Enumeration(model).run(x[60:], y[60:]).log_evidence.mean().item()

    before = held_out()
    e_step = GFlowNet(model, guide, optimizer=ADAM(q.trainable_parameters(), lr=1e-2))
    em = VariationalEM(model, guide, e_step, ADAM(p.trainable_parameters(), lr=3e-2))
    em.fit([(x[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)], 24, progress=False)
    after = held_out()
    assert before < -1.2 and after > -entropy - 0.2
    # No y from here on.
    posterior = em.run(x[:4], y[:4], num_particles=16)
    prompts, n = lm.encode(letters), 4000
    prediction = posterior.predict(model, letters, prompts, None, sampler="prior", num_particles=n)
    assert prediction.probabilities.argmax(0).tolist() == [1, 2, 3, 0]
    each = prediction.log_probs[0].exp()  # p("a" | x, z_n), (n, 4)
    truth = Enumeration(model).run(prompts, lm.encode(["a"] * 4)).log_evidence.exp()
    assert bool(((each.mean(0) - truth).abs() < 5 * (each.var(0) / n).sqrt() + 1e-12).all())


def test_several_tasks_share_the_parameters():
    task = Task()
    x, y = task.args
    batches = [(task.model, task.model, [(x[:2], y[:2])]), (task.model, task.model, [(x[2:], y[2:])])]
    em = VariationalEM(task.model, None, Enumeration(task.model), SGD(task.theta, lr=1e-9))
    found = em.fit(batches, 2, progress=False)
    assert sum(m["log_evidence"] for m in found) == pytest.approx(task.log_likelihood(), abs=1e-5)


def test_bad_arguments_are_named():
    task = Task()
    m, exact = SGD(task.theta, lr=0.1), Enumeration(task.model)
    cases = {
        "m_optimizer": lambda: VariationalEM(task.model, None, exact, task.theta),
        "e_step: expected": lambda: VariationalEM(task.model, None, task.guide, m),
        "e_step: it was built with another model": lambda: VariationalEM(task.guide, None, exact, m),
        "exact: it was built with another model": lambda: VariationalEM(
            task.model, None, exact, m, exact=Enumeration(task.guide)
        ),
        "exact: expected": lambda: VariationalEM(task.model, None, exact, m, exact=3),
        "guide": lambda: VariationalEM(task.model, task.model, task.gflownet(), m),
        "weighted": lambda: VariationalEM(task.model, None, exact, m, weighted=False),
        "steps": lambda: VariationalEM(task.model, None, exact, m).fit([task.args], 0),
    }
    for name in ("e_steps", "m_steps", "num_particles", "max_particles"):
        cases[name] = lambda name=name: VariationalEM(task.model, None, exact, m, **{name: 0})
    for message, make in cases.items():
        with pytest.raises(ValueError, match=message):
            make()
