"""Variational EM: each step moves its own parameters alone, fitting resumes, and what is learned predicts."""

from __future__ import annotations

import json
import math

import pyro
import pytest
import torch
from em_task import ADAM, SGD, SIZE, Task
from tiny import adapter, flat_lm
from torch import Tensor

from lmppl.distributions import Completion
from lmppl.inference import Enumeration, GFlowNet, Importance, Replay, ReweightedWakeSleep, VariationalEM

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
    seen = replay.observations(task.model, task.guide, task.args, {}, 1)  # what the next E-step begins with
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
    with pytest.raises(ValueError, match="site 'f': its log-probability is inf"):
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


@pytest.mark.slow
def test_a_guide_that_sees_y_teaches_a_model_to_predict_it():
    """y follows x in the alphabet 85 times in 100, else any other letter; 60 pairs to learn from, 100 to predict."""
    lm = flat_lm(vocab=6, seed=3, dtype=torch.float64)
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
