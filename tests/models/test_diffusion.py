"""Infilling by unmasking: the posterior over texts by sums over paths, and the embedded experiment's parts."""

from __future__ import annotations

import itertools
import math

import pyro
import pytest
import torch
from reference import Law, Plain, tokens
from tiny import flat_lm
from tiny_masked import masked_lm, plain_paths

from lmppl import LanguageModel
from lmppl.embedded import Story
from lmppl.inference import Enumeration, Importance, weigh
from lmppl.inference.core.query import Query
from lmppl.inference.judging.quality import density_quality
from lmppl.models import EXPERIMENTS, Diffusion
from lmppl.models.diffusion import text_log_joint


@pytest.fixture(scope="module")
def tiny():
    """A masked language model of the letters a, b, c, and a causal one that has "." too, other ids for the same."""
    lm, reader = masked_lm(vocab=5), flat_lm(vocab=5)
    task = Diffusion(lm, reader, masked_lm(vocab=5, seed=1), guide_order="confidence")
    return task, *task.encode([Story("a", "bc", "ab"), Story("ca", "bb", "c")])


def test_the_posterior_of_texts_is_that_of_plain_loops(tiny):
    task, x, y = tiny
    lm = task.lm
    letters = [i for i in range(lm.vocab_size) if bool(task.words[i])]
    middles = torch.tensor([*itertools.product(letters, repeat=2)])
    found = text_log_joint(task, x, y, middles[:, None].expand(-1, 2, -1))
    exact = Enumeration(task.model).run(x, y)
    for i, (begin, end) in enumerate((("a", "ab"), ("ca", "c"))):
        plain, paths = Plain(task.reader), {}
        with torch.no_grad():
            for path, log_p in plain_paths(lm, tokens(x[i]), words=letters).items():
                z = lm.decode(torch.tensor([w for _, w in sorted(path)]))
                paths.setdefault(z, []).append(float(log_p))
        assert len(paths) == 9 and all(len(of_text) == 2 for of_text in paths.values())
        seen = tokens(task.reader.encode(end))
        log_joint = {
            z: float(torch.tensor(of_text, dtype=torch.double).logsumexp(0))
            + Law(plain, tokens(task.reader.encode(begin + z)), len(seen), stops=()).log_prob(seen)
            for z, of_text in paths.items()
        }
        total = float(torch.tensor([*log_joint.values()], dtype=torch.double).logsumexp(0))
        assert float(exact.log_evidence[i]) == pytest.approx(total, abs=1e-9)
        by_text = dict(exact.table("z", i))
        for words, log_p in zip(middles, found[:, i].tolist(), strict=True):
            z = lm.decode(words)
            assert log_p == pytest.approx(log_joint[z], abs=1e-9)
            assert by_text[z] == pytest.approx(math.exp(log_p - total), abs=1e-9)


def test_importance_sampling_estimates_the_evidence_with_and_without_the_guide(tiny):
    """The mean of N weights, whose standard error is their spread over sqrt(N), within 5 of them."""
    task, x, y = tiny
    truth, n = Enumeration(task.model).run(x, y).log_evidence.exp(), 3000
    pyro.set_rng_seed(0)
    for guide in (None, task.guide):
        weights = Importance(task.model, guide, num_particles=n).run(x, y).log_weights.exp() * n
        assert bool(((weights.mean(0) - truth).abs() < 5 * weights.std(0) / n**0.5).all())


def test_gaps_are_as_long_as_the_middles_and_the_guide_reads_the_ending(tiny):
    task, _, _ = tiny
    x, y = task.encode([Story("a", "bcb", "a"), Story("ca", "b", "cc")])
    assert task.prior(x).max_tokens.tolist() == task.posterior(x, y).max_tokens.tolist() == [3, 1]
    mask = task.lm.mask_id
    guide = task.posterior(x, y).prompt.tolist()
    assert guide == [[2, mask, mask, mask, 2], [4, 2, mask, 4, 4]]
    assert task.reader.decode(task.read(task.lm.encode(["abc", "b"]))) == ["abc", "b"]
    with pytest.raises(ValueError, match="guide_lm"):
        Diffusion(task.lm, task.reader).guide(x, y)


def test_the_experiment_reads_the_same_tokens_as_the_causal_one():
    e = EXPERIMENTS["diffusion"]()
    x, y = e.test
    task = e.model.__self__
    assert task.same_tokens and e.exact is None and len(x) == 16
    assert task.prior(x).max_tokens.tolist() == [6] * 16
    causal = EXPERIMENTS["infilling"]()
    begin, end = causal.test
    assert torch.equal(y, end) and torch.equal(x[:, : begin.shape[1]], begin)
    pyro.set_rng_seed(0)
    drawn = weigh(Query(e.model, e.guide, e.test), 8)
    assert drawn.u.shape == (8, 16) and bool(drawn.u.isfinite().all())


def test_what_is_missing_is_named(tmp_path):
    e = EXPERIMENTS["diffusion"]()
    with pytest.raises(ValueError, match="data: another language model needs"):
        EXPERIMENTS["diffusion"](e.lm)
    with pytest.raises(ValueError, match="lm: expected a MaskedLanguageModel, got LanguageModel"):
        EXPERIMENTS["diffusion"](LanguageModel.embedded("stories"))
    (tmp_path / "own.txt").write_text("Tom went to the barn. He got the old axe. He swung it.\n" * 3)
    with pytest.raises(ValueError, match="reader"):
        EXPERIMENTS["diffusion"](e.lm, tmp_path / "own.txt")
    with pytest.raises(ValueError, match="order: expected one of"):
        EXPERIMENTS["diffusion"](order="backwards").model(*e.test)
    own = EXPERIMENTS["diffusion"](e.lm, tmp_path / "own.txt", reader=LanguageModel.embedded("stories"))
    assert own.describe(0) == "Tom went to the barn. [...] He swung it.    (told: He got the old axe.)"


def test_from_left_to_right_the_posterior_is_enumerated_and_the_untrained_guide_is_near_it():
    """Its evidence is that of weighted draws, within 5 standard errors and the prior mass that was left out."""
    e = EXPERIMENTS["diffusion"](order="left-to-right")
    args = tuple(v[:4] for v in e.test)
    exact = e.exact.run(*args)
    programs = e.guide, lambda x, y: e.model(x, y)  # the prior writes the same site
    of_guide, of_prior = (density_quality(exact, q, args, {}).total_variation for q in programs)
    assert of_guide.mean() < 0.2 and of_prior.min() > 0.8
    pyro.set_rng_seed(0)
    u = weigh(Query(e.model, e.guide, args), 2000).u
    evidence, error = u.exp().mean(0), u.exp().std(0) / 2000**0.5
    truth = exact.log_evidence.exp()
    assert bool((evidence - truth > -5 * error).all()) and bool((evidence - truth < 5 * error + exact.unexplored).all())
