"""Contrastive continuation: the target by plain loops, its identities, a short training, the command line."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from precision import single
from reference import Law, Plain, tokens
from tiny import tiny_lm

from lmppl import cli
from lmppl.constraints import Slots
from lmppl.inference import Enumeration, GFlowNet, Importance
from lmppl.inference.core.programs import Substitute, trace
from lmppl.inference.judging.quality import density_quality
from lmppl.models import EXPERIMENTS, Contrastive, Recipe
from lmppl.models.contrastive import DIFFER, read_pairs

MAX_TOKENS = 3
POWERS = [(1.0, 0.0), (1.25, 0.25), (2.0, 1.0), (0.7, 1.3)]


@pytest.fixture(scope="module")
def tiny():
    lm = tiny_lm(vocab=6, seed=2)
    return lm, lm.encode(["ab", "c"]), lm.encode(["ca", "b"])


@pytest.fixture(scope="module")
def laws(tiny):
    """log p(z | x) and log p(z | x') of every text, for each pair, by plain loops."""
    lm, *prompts = tiny
    plain, end = Plain(lm), lm.token_id(".")
    x, other = ([Law(plain, tokens(p), MAX_TOKENS, stops=(end,)).support() for p in side] for side in prompts)
    return list(zip(x, other, strict=True))


@pytest.mark.parametrize(("a", "b"), POWERS)
def test_the_enumerated_target_is_that_of_plain_loops(tiny, laws, a, b):
    lm, *args = tiny
    exact = Enumeration(Contrastive(lm, a=a, b=b, max_tokens=MAX_TOKENS).model).run(*args)
    assert not exact.unexplored.any()
    for i, (after, after_other) in enumerate(laws):
        target = {z: a * p - b * after_other[z] for z, p in after.items()}
        log_z = math.log(sum(math.exp(u) for u in target.values()))
        assert exact.log_evidence[i].item() == pytest.approx(log_z, abs=1e-9)
        found = {tokens(z): float(w) for z, w in zip(exact.samples["z"][:, i], exact.probabilities[:, i], strict=True)}
        assert found.keys() == target.keys()
        assert all(found[z] == pytest.approx(math.exp(u - log_z), abs=1e-9) for z, u in target.items())


def test_it_is_the_language_model_where_nothing_is_contrasted(tiny, laws):
    """b = 0 and a = 1; and the same prompt twice, a - b = 1."""
    lm, x, other = tiny
    for a, b, args in ((1.0, 0.0, (x, other)), (2.0, 1.0, (x, x)), (1.25, 0.25, (x, x))):
        exact = Enumeration(Contrastive(lm, a=a, b=b, max_tokens=MAX_TOKENS).model).run(*args)
        torch.testing.assert_close(exact.log_evidence, torch.zeros(2).double(), atol=1e-9, rtol=0)
        for i, (after, _) in enumerate(laws):
            for z, p in zip(exact.samples["z"][:, i], exact.probabilities[:, i].tolist(), strict=True):
                assert p == pytest.approx(math.exp(after[tokens(z)]), abs=1e-9)


def test_with_powers_that_differ_by_one_log_z_is_a_divergence(tiny, laws):
    """log Z = b D_a >= 0, increasing in a; at b = 1 it is log(1 + chi^2), here by the mean under the other prompt."""
    lm, x, other = tiny
    log_z = [
        Enumeration(Contrastive(lm, a=1 + b, b=b, max_tokens=MAX_TOKENS).model).run(x, other).log_evidence
        for b in (0.1, 0.5, 1.0)
    ]
    renyi = torch.stack([z / b for z, b in zip(log_z, (0.1, 0.5, 1.0), strict=True)])
    assert (renyi[0] > 0).all() and (renyi[1:] > renyi[:-1]).all()
    for i, (after, after_other) in enumerate(laws):
        squared = sum(math.exp(q) * math.exp(after[z] - q) ** 2 for z, q in after_other.items())
        assert log_z[2][i].exp().item() == pytest.approx(squared, rel=1e-9)


def test_as_b_grows_what_the_other_prompt_says_least_is_all_that_is_left(tiny, laws):
    lm, *args = tiny
    exact = Enumeration(Contrastive(lm, a=1.0, b=400.0, max_tokens=MAX_TOKENS).model).run(*args)
    for i, (_, after_other) in enumerate(laws):
        best = exact.probabilities[:, i].argmax()
        assert tokens(exact.samples["z"][best, i]) == min(after_other, key=after_other.__getitem__)
        assert exact.probabilities[best, i] > 0.9


def test_what_is_impossible_after_both_stays_impossible(tiny):
    """0^a / 0^b counts as 0, not as no number."""
    lm, *args = tiny
    task = Contrastive(lm, max_tokens=MAX_TOKENS, allowed=Slots(lm, [["a", "b"], ["c"], ["."]]))
    values = {"z": lm.encode(["ac.", "cc."])[:, None].expand(2, 2, -1)}
    run = trace(task.model, tuple(args), {}, Substitute(values), nesting=1, particles=2)
    assert run.log_prob_sum() == -torch.inf
    assert run.nodes["contrast"]["fn"].log_prob(run.nodes["contrast"]["value"]).isfinite().all()


@pytest.mark.slow
def test_a_short_training_reaches_the_target(tiny):
    lm, *args = tiny
    recipe = Recipe(adapter={"r": 8, "lora_alpha": 16, "target_modules": "all-linear"})
    task = Contrastive(lm, recipe.guide_lm(lm, 1), a=2.0, b=1.0, max_tokens=MAX_TOKENS, template="{other}{x}")
    exact = Enumeration(task.model).run(*args)

    def tv():
        return density_quality(exact, task.guide, tuple(args), {}).total_variation

    assert float(tv().min()) > 0.25
    optimizer = torch.optim.AdamW(task.guide_lm.trainable_parameters(), lr=1e-2)
    gflownet = GFlowNet(task.model, task.guide, optimizer=optimizer, num_particles=32)
    gflownet.fit([tuple(args)], 200, progress=False)
    assert float(tv().max()) < 0.1
    posterior = gflownet.run(*args, num_particles=2000)
    error = (1 / posterior.ess - 1 / 2000).clamp(min=1e-4).sqrt()  # of the log of a mean weight
    assert ((posterior.log_evidence - exact.log_evidence).abs() < 5 * error).all()


@pytest.mark.parametrize("differ", list(DIFFER))
def test_no_pair_is_in_two_splits(differ):
    told = [[{x.split(" ", 1)[1] for x in pair} for pair in split] for split in DIFFER[differ]()]
    assert [len(split) for split in told] == [512, 16, 16] and all(len(pair) == 2 for split in told for pair in split)
    if differ == "objects":  # the last word of the sentence
        told = [[{x.split(".")[0].split()[-1] for x in pair} for pair in split] for split in told]
    keys = [{frozenset(pair) for pair in split} for split in told]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]


def test_the_embedded_target_is_enumerated_whole():
    """All 2,560 sentences: the prior's probabilities add up to one, and sampling agrees with the evidence."""
    e = EXPERIMENTS["contrastive"](a=2.0, b=1.0)
    args = tuple(t[:2] for t in e.test)
    exact = e.exact.run(*args)
    assert len(exact.samples["z"]) == 2560 and not exact.unexplored.any()
    torch.testing.assert_close(exact.log_prior.exp().sum(0), torch.ones(2), atol=single(10), rtol=0)
    torch.manual_seed(0)
    u = Importance(e.model, num_particles=2000).run(*args).log_weights + math.log(2000)
    error = u.exp().std(0) / 2000**0.5
    assert ((u.exp().mean(0) - exact.log_evidence.exp()).abs() < 5 * error + 1e-5).all()


def test_the_command_line(tmp_path, monkeypatch, capfd):
    """With a = 1 and b = 0 every draw of the prior weighs one: log Z is 0 exactly."""
    lm = tiny_lm(vocab=6)
    lm.model.save_pretrained(tmp_path / "lm")
    lm.tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "pairs.txt").write_text("ab\tca\n\nbc\tb\n")
    monkeypatch.chdir(tmp_path)
    options = ("--lm", "lm", "--data", "pairs.txt", "--set", "max_tokens=3")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lmppl", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capfd.readouterr().err

    run("compare", "contrastive", *options, "--set", "a=1", "--set", "b=0", "--steps", "2", "--particles", "8")
    rows = {r["name"]: r for r in json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]}
    assert rows["importance sampling (prior)"]["log_evidence"] == pytest.approx(0.0, abs=1e-9)
    assert rows["importance sampling (prior)"]["ess"] == pytest.approx(1.0, abs=1e-9)
    run("train", "contrastive", *options, "--steps", "2", "--out", "out/train")
    run("sample", "contrastive", *options, "--checkpoint", "out/train/adapter", "--particles", "4")
    assert "and not after: b" in capfd.readouterr().out


@pytest.mark.parametrize("text", ["", "one prompt\n", "a\tb\tc\n", "a\t\n"])
def test_a_file_that_holds_no_pairs(tmp_path, text):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(ValueError, match="data: .*pairs.txt"):
        read_pairs(tmp_path / "pairs.txt")


def test_arguments_out_of_range(tiny):
    lm, *args = tiny
    for a, b in ((0.0, 1.0), (1.0, -0.5), (math.inf, 0.0), (1.0, math.nan)):
        with pytest.raises(ValueError, match="a, b"):
            Contrastive(lm, a=a, b=b)
    with pytest.raises(ValueError, match="guide_lm"):
        Contrastive(lm).guide(*args)
    with pytest.raises(ValueError, match="data"):
        EXPERIMENTS["contrastive"](lm)
    with pytest.raises(ValueError, match="differ"):
        EXPERIMENTS["contrastive"](differ="places")
