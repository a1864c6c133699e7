"""The trainer: it reaches the posterior, a resumed run repeats an uninterrupted one, nothing is lost on bad input."""

from __future__ import annotations

import json

import pyro
import pytest
import torch
from tasks import Task

from lmppl import text
from lmppl.distributions import Completion
from lmppl.inference import Enumeration, GFlowNet, PooledVarGrad, VarGrad
from lmppl.inference.judging.quality import density_quality
from lmppl.inference.training.loop import checkpoint as checkpoints


def test_training_reaches_the_exact_posterior():
    task = Task(vocab=5)
    exact = Enumeration(task.model).run(*task.args)
    before = density_quality(exact, task.guide, task.args, {}).total_variation
    gflownet = task.gflownet(lr=2e-2)
    history = gflownet.fit([task.args], 80, progress=False, held_out=task.args, evaluate_every=80)
    after = density_quality(exact, task.guide, task.args, {})
    assert float(before.mean()) > 0.4
    assert float(after.total_variation.max()) < 0.1
    assert history[-1]["held_out_sd_u"] < 0.35 and history[-1]["held_out_ess"] > 0.9
    posterior = gflownet.run(*task.args, num_particles=2000)
    error = (posterior.log_evidence - exact.log_evidence).abs()
    assert bool((error < 5 * (1 / posterior.ess - 1 / 2000).clamp(min=1e-4).sqrt()).all())  # sd of log mean weight


def test_an_observation_that_no_latent_explains_is_told_once_and_teaches_nothing(caplog):
    task = Task()
    (x, y), wrong = task.args, task.lm.encode(["cab", "ed"])  # without a stop
    both = torch.stack([y[0], text.pad(wrong, y.shape[-1])[1]])
    values = {"z": task.q_of(x, y).sample(torch.Size([8]))}
    for objective in (VarGrad(num_particles=8), PooledVarGrad(num_particles=8)):
        caplog.clear()
        found, alone = (
            [
                *torch.autograd.grad(
                    objective.loss_at(task.model, task.guide, given, {}, z)[0] * n, task.q.trainable_parameters()
                )
            ]
            for given, z, n in (((x, both), values, 2), ((x[:1], y[:1]), {"z": values["z"][:, :1]}, 1))
        )
        assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(found, alone, strict=True))
        objective.loss(task.model, task.guide, x, both)
        (said,) = [r.getMessage() for r in caplog.records]
        assert "teaches nothing" in said and "site 'y': the observed text does not end with its stop token" in said


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    whole, first, second = Task(), Task(), Task()
    expected = whole.gflownet().fit([whole.args], 6, progress=False, seed=5)

    def stop_after_4(step, metrics):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.gflownet().fit(
            [first.args], 6, progress=False, seed=5, checkpoint=tmp_path / "c", checkpoint_every=2,
            callback=stop_after_4,
        )  # fmt: skip
    resumed = second.gflownet()
    rest = resumed.fit([second.args], 6, progress=False, seed=5, checkpoint=tmp_path / "c", log=tmp_path / "run.jsonl")
    # The interruption came before the checkpoint of step 4 was written: steps 3 to 6 are run again.
    assert [m["loss"] for m in rest] == [m["loss"] for m in expected[2:]]
    for a, b in zip(whole.q.trainable_parameters(), second.q.trainable_parameters(), strict=True):
        assert torch.equal(a, b)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 5]
    assert resumed.optimizer.param_groups[0]["lr"] == 1e-2  # the schedule leaves the rate as it was


def test_held_out_lengths_and_stops_are_the_guides_own():
    task = Task(dtype=torch.float64)
    q = Completion(task.q, task.q.join(task.args[1], task.args[0]), max_tokens=2)
    support = q.enumerate_support()
    with torch.no_grad():
        p, stop = q.log_prob(support).exp(), q.prefix_scores(support).stop_log_probs
    end = (support == task.lm.eos_id).long().argmax(-1)  # (K, 2)
    own = stop.gather(-1, end[..., None])[..., 0].exp()
    n = 4000
    found = task.gflownet().evaluate(*task.args, num_particles=n)
    for key, f in {"held_out_length": end.double(), "held_out_stop": own}.items():
        mean = (p * f).sum(0)
        error = ((p * (f - mean) ** 2).sum(0) / n).mean().sqrt() / 2**0.5  # of the mean over two observations
        assert abs(found[key] - float(mean.mean())) < 5 * float(error), key


def test_a_resumed_log_has_every_step_once(tmp_path):
    task = Task()

    def stop_after_4(step, metrics):
        if step == 3:
            raise KeyboardInterrupt

    where = {"checkpoint": tmp_path / "c", "checkpoint_every": 2, "log": tmp_path / "run.jsonl", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        task.gflownet().fit([task.args], 6, callback=stop_after_4, **where)
    task.gflownet().fit([task.args], 6, **where)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 5]


def test_fit_leaves_the_callers_generator_alone():
    task = Task()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    task.gflownet().fit([task.args], 1, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_not_finite_updates_nothing():
    task = Task()
    gflownet = task.gflownet(objective=VarGrad())
    broken = Completion.log_prob
    before = [p.clone() for p in task.q.trainable_parameters()]

    def model(x, y):
        with pyro.plate("stories", len(x)):
            pyro.sample("z", Completion(task.lm, x, max_tokens=2))
            pyro.factor("f", torch.full((len(x),), float("inf")))

    gflownet.model = model
    with pytest.raises(ValueError, match="site 'f': its log-probability is inf"):
        gflownet.step(*task.args)
    assert all(torch.equal(a, b) for a, b in zip(before, task.q.trainable_parameters(), strict=True))
    assert Completion.log_prob is broken


def test_training_tokens_count_what_went_through_the_network():
    task = Task()
    gflownet = task.gflownet()
    gflownet.step(*task.args)
    before, counted = task.lm.tokens_scored, gflownet.training_tokens
    gflownet.step(*task.args)
    assert gflownet.training_tokens - counted == task.lm.tokens_scored - before > 0


def test_training_tokens_count_every_guide_of_one_model():
    """Two tasks with the same model; the second guide has a network of its own."""
    task, other = Task(), Task()
    gflownet = task.gflownet()
    before = task.lm.tokens_scored + other.lm.tokens_scored
    tasks = [(task.model, guide, [task.args]) for guide in (task.guide, other.guide)]
    gflownet.fit(tasks, 2, progress=False)
    assert other.lm.tokens_scored > 0
    assert gflownet.training_tokens == task.lm.tokens_scored + other.lm.tokens_scored - before


def test_the_objective_given_is_not_changed():
    objective = PooledVarGrad(num_particles=4)
    task = Task()
    gflownet = task.gflownet(objective=objective, num_particles=7, reward_temperature=2.0)
    assert (gflownet.objective.num_particles, gflownet.objective.reward_temperature) == (7, 2.0)
    assert (objective.num_particles, objective.reward_temperature, objective.exploration) == (4, 1.0, None)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    task = Task()
    gflownet = task.gflownet()
    gflownet.fit([task.args], 1, progress=False, checkpoint=tmp_path / "c")
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="checkpoint"):
        checkpoints.load(tmp_path / "c", other)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda t: t.gflownet().fit([], 1), "batches"),
        (lambda t: t.gflownet().fit([t.args], 0), "steps"),
        (lambda t: GFlowNet(t.model, t.guide, optimizer=torch.optim.AdamW), "optimizer"),
        (lambda t: t.gflownet(replay=object()), "replay"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call(Task())
