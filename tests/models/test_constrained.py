"""Constrained generation: targets by plain loops, the three conditions, a short training, the command line."""

from __future__ import annotations

import json
import math
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from precision import single
from reference import Law, Plain, tokens
from tiny import tiny_lm

from lmppl import LanguageModel, cli, text
from lmppl.constraints import Slots, regex
from lmppl.distributions import Completion
from lmppl.inference import Enumeration, GFlowNet, Importance, Mixture, OnPolicy
from lmppl.inference.judging.quality import density_quality
from lmppl.inference.training.gflownet.exploration import Source
from lmppl.models import EXPERIMENTS, Constrained, Recipe
from lmppl.models.classifier import TokenClassifier, read_labelled
from lmppl.models.constrained import PATTERN, ContainsWords, Planted, rest_of_story

MAX_TOKENS = 3
TV = 0.15


@pytest.fixture(scope="module")
def tiny():
    lm = tiny_lm(vocab=6, seed=24)
    return lm, lm.encode(["ab", "c"])


@pytest.fixture(scope="module")
def laws(tiny):
    """log p(z | x) of every text, for each prompt, by plain loops."""
    lm, x = tiny
    return [Law(Plain(lm), tokens(p), MAX_TOKENS, stops=(lm.token_id("."),)).support() for p in x]


@pytest.fixture(scope="module")
def embedded():
    return LanguageModel.embedded("stories")


def has_letter(z, w):
    """The hard condition that the text has its own letter: that has probability 0.12 and 0.07."""
    return torch.zeros(z.shape[:-1]).masked_fill((z != w[:, :1]).all(-1), -torch.inf)


def test_the_enumerated_target_is_that_of_plain_loops(tiny, laws):
    lm, x = tiny
    w = lm.encode(["a", "c"])
    task = Constrained(lm, condition=has_letter, max_tokens=MAX_TOKENS, stop=".")
    exact = Enumeration(task.model).run(x, w)
    for i, law in enumerate(laws):
        letter = int(w[i, 0])
        target = {z: p for z, p in law.items() if letter in z}
        evidence = sum(map(math.exp, target.values()))
        assert 0.001 < evidence < 0.5
        assert exact.log_evidence[i].item() == pytest.approx(math.log(evidence), abs=1e-9)
        for z, p in zip(exact.samples["z"][:, i], exact.probabilities[:, i].tolist(), strict=True):
            assert p == pytest.approx(math.exp(target.get(tokens(z), -math.inf)) / evidence, abs=1e-9)
    # What can satisfy, listed, is as good as everything.
    listed = torch.unique(exact.samples["z"].flatten(0, 1), dim=0)
    again = Enumeration(task.among(lambda x, w: listed)).run(x, w)
    torch.testing.assert_close(again.log_evidence, exact.log_evidence, atol=1e-9, rtol=0)
    assert [again.table("z", i)[0][0] for i in (0, 1)] == [exact.table("z", i)[0][0] for i in (0, 1)]


def test_with_no_condition_it_is_the_language_model(tiny, laws):
    lm, x = tiny
    task = Constrained(lm, condition=lambda z: torch.zeros(z.shape[:-1]), max_tokens=MAX_TOKENS, stop=".")
    exact = Enumeration(task.model).run(x)
    torch.testing.assert_close(exact.log_evidence, torch.zeros(2).double(), atol=1e-9, rtol=0)
    for i, law in enumerate(laws):
        for z, p in zip(exact.samples["z"][:, i], exact.probabilities[:, i].tolist(), strict=True):
            assert p == pytest.approx(math.exp(law[tokens(z)]), abs=1e-9)


def test_the_relaxed_target_differs_by_what_it_lets_through(tiny):
    """Z_r = Z + e^-penalty (1 - Z)."""
    lm, x = tiny
    w = lm.encode(["a", "c"])
    task = Constrained(lm, condition=has_letter, max_tokens=MAX_TOKENS, stop=".")
    z = Enumeration(task.model).run(x, w).log_evidence.exp()
    for penalty in (0.0, 3.0, 12.0):
        relaxed = Enumeration(task.relaxed(penalty)).run(x, w).log_evidence.exp()
        torch.testing.assert_close(relaxed, z + math.exp(-penalty) * (1 - z), atol=1e-9, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text("ab'-", min_size=1, max_size=2), min_size=1, max_size=2), min_size=1, max_size=3),
       st.lists(st.text("ab'- ", max_size=6), min_size=1, max_size=4))  # fmt: skip
def test_words_are_found_as_whole_words(asked, said):
    """Against a plain loop over texts and words; decoding is a list of strings here."""

    class Letters:
        def decode(self, z):
            rows = z.reshape(-1, z.shape[-1]).tolist()
            return ["".join(chr(i) for i in row if i != text.PAD) for row in rows]

    def encode(strings, *axes):
        width = max(1, *map(len, strings))
        rows = [[*map(ord, s), *[text.PAD] * (width - len(s))] for s in strings]
        return torch.tensor(rows).view(*axes, width)

    w = encode([" ".join(words) for words in asked], len(asked))
    z = encode(said, len(said), 1)
    found = ContainsWords(Letters())(z.expand(-1, len(asked), -1), w)
    assert torch.equal(found, ContainsWords(Letters())(z, w))  # z that does not vary over the plate
    for n, s in enumerate(said):
        for b, words in enumerate(asked):
            expected = all(_whole(word, f" {s} ") for word in " ".join(words).split())
            assert (found[n, b].item() == 0.0) == expected and found[n, b].item() in (0.0, -math.inf)


def _whole(word: str, said: str) -> bool:
    """Whether a word stands somewhere with no letter on either side."""
    starts = [i for i in range(1, len(said)) if said.startswith(word, i)]
    return any(not said[i - 1].isalnum() and not said[i + len(word)].isalnum() for i in starts)


def test_planted_words_are_there(tiny):
    lm, x = tiny
    task = Constrained(lm, lm, condition=has_letter, max_tokens=6, stop=".")
    w = lm.encode(["aa", "b"])
    source = Source(task.model, task.guide, (x, w), {}, max_plate_nesting=1)
    torch.manual_seed(0)
    for where in ("anywhere", "end"):
        z = Planted(where).draw(source, 200)["z"]
        long = text.length(z) - 1 >= torch.tensor([2, 1])  # room for them
        assert int(long.sum()) > 50 and bool((z == lm.token_id(".")).any(-1).all())
        for i, word in enumerate(("aa", "b")):
            said = lm.decode(z[:, i][long[:, i]])
            assert all(word in s if where == "anywhere" else s.endswith(word + ".") for s in said)
            assert where == "end" or len({s.index(word) for s in said}) > 1


def test_slots_are_all_the_texts_and_nothing_else(tiny):
    lm, x = tiny
    slots = Slots(lm, [["a", "b"], ["b", "c"], ["."]], [["c"], ["."]])
    texts = slots.texts()
    assert sorted(lm.decode(texts)) == sorted(["ab.", "ac.", "bb.", "bc.", "c."])
    assert slots.accepts(texts).all() and not slots.accepts(lm.encode(["a.", "ab", "cb.", "ca", "abb."])).any()
    total = Completion(lm, x, max_tokens=4, stop=".", allowed=slots).log_prob(texts[:, None]).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(2).double(), rtol=0, atol=1e-9)
    for forms in ((), ([],), ([["no such"]],)):
        with pytest.raises(ValueError, match="forms"):
            Slots(lm, *forms)


def test_the_classifier_is_at_its_maximum(embedded):
    """The gradient vanishes there, and a second fit finds the same; tokens that mark the label weigh for it."""
    said = [" He took the old axe.", " He took the old hat.", " She got the new axe.", " She got the new cake."] * 3
    labels = ["axe" in s for s in said]
    found, again = (TokenClassifier.fitted(embedded, said, labels, ridge=0.1) for _ in range(2))
    assert torch.equal(found.weights, again.weights)
    z, y = embedded.encode(said), torch.tensor([float(label) for label in labels])
    counts = torch.stack([torch.bincount(row[row != text.PAD], minlength=embedded.vocab_size) for row in z]).float()
    p = torch.sigmoid(found.bias + counts @ found.weights)
    assert torch.allclose(found(z), p.log(), rtol=0, atol=single(10))
    assert (counts.T @ (p - y) / len(y) + 0.1 * found.weights).norm() < 1e-3 and abs((p - y).mean()) < 1e-3
    marked, other = (embedded.token_id(t) for t in (" axe", " cake"))
    assert found.weights[marked] > 0 > found.weights[other]
    with pytest.raises(ValueError, match="labels"):
        TokenClassifier.fitted(embedded, said, [True] * len(said))


@pytest.mark.parametrize(
    "constraint", ["lexical", "learned", pytest.param("regex", marks=pytest.mark.slow, id="regex")]
)
def test_the_embedded_target_is_known(embedded, constraint):
    """Sampling from the language model agrees with what is listed, and nothing that satisfies is not listed."""
    e = EXPERIMENTS["constrained"](constraint=constraint)
    args = tuple(t[:2] for t in e.test)
    exact = e.exact.run(*args)
    n = 4000
    torch.manual_seed(0)
    drawn = Importance(e.model, num_particles=n).run(*args)
    weight = (drawn.log_weights + math.log(n)).exp()  # whose mean is the evidence
    z = exact.log_evidence.exp()
    low, high = {"lexical": (0.005, 0.05), "regex": (0.01, 0.05), "learned": (0.05, 0.5)}[constraint]
    assert ((low < z) & (z < high)).all(), z
    error = weight.std(0) / n**0.5
    assert ((weight.mean(0) - z).abs() < 5 * error).all(), (weight.mean(0), z, error)
    for i in range(2):
        listed = {s for s, p in exact.table("z", i) if p > 0}
        assert {s for s, p in drawn.table("z", i) if p > 0} <= listed


def test_the_pattern_lists_what_it_should(embedded):
    stories, longest = rest_of_story(embedded, verbs=["wore", "washed", "sold"], adjectives=["old", "new"])
    texts = stories.texts()
    assert texts.shape == (2 * 4 * 2 * 96 * 3, longest + 1)
    matches = regex(embedded, PATTERN).accepts(texts)
    by_python = torch.tensor([re.fullmatch(PATTERN, s) is not None for s in embedded.decode(texts)])
    assert torch.equal(matches, by_python) and int(matches.sum()) == 2 * 4 * 96 * 2


@pytest.mark.slow
def test_a_mask_always_satisfies_and_is_another_distribution(embedded):
    e = EXPERIMENTS["constrained"](constraint="regex")
    task = e.model.__self__
    x = e.test[0][:1]
    exact = e.exact.run(x)
    quality = density_quality(exact, task.masked(regex(embedded, PATTERN), lm=embedded), (x,), {})
    assert quality.reverse_kl.isfinite().all() and float(quality.total_variation) > 0.5


@pytest.mark.slow
def test_a_short_training_reaches_the_posterior(tiny):
    lm, x = tiny
    args = (x[:1], lm.encode(["a"]))
    q = Recipe(adapter={"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}).guide_lm(lm, 1)
    task = Constrained(lm, q, condition=has_letter, max_tokens=MAX_TOKENS, stop=".", template="{w}{x}")
    exact = Enumeration(task.model).run(*args)

    def tv():
        return density_quality(exact, task.guide, args, {}).total_variation

    assert float(tv().min()) > 0.6
    gflownet = GFlowNet(
        task.relaxed(10.0), task.guide, num_particles=32, exploration=Mixture((OnPolicy(), 0.5), (Planted(), 0.5)),
        optimizer=torch.optim.AdamW(q.trainable_parameters(), lr=1e-2),
    )  # fmt: skip
    gflownet.fit([args], 150, progress=False)
    assert float(tv().max()) < TV


def test_the_command_line(tmp_path, monkeypatch, capfd):
    """Words that every text has: the evidence is one, and every draw of the prior weighs one."""
    lm = tiny_lm(vocab=6)
    lm.model.save_pretrained(tmp_path / "lm")
    lm.tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "prompts.txt").write_text("ab\ncb\n")
    (tmp_path / "labelled.txt").write_text("1\tab\n0\tba\n1\taab\n0\tcc\n")
    monkeypatch.chdir(tmp_path)
    options = ("--lm", "lm", "--data", "prompts.txt", "--set", "max_tokens=3", "--particles", "8")

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["lmppl", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert (stop.value.code or 0) == code, capfd.readouterr().err

    run("compare", "constrained", *options, "--steps", "2", "--set", "constraint=regex", "--set", "pattern=[abcd.]*")
    rows = {r["name"]: r for r in json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]}
    assert rows["importance sampling (prior)"]["log_evidence"] == pytest.approx(0.0, abs=single())
    assert rows["importance sampling (prior)"]["ess"] == pytest.approx(1.0, abs=single())
    learned = ("--set", "constraint=learned", "--set", "labelled=labelled.txt")
    run("compare", "constrained", *options, "--steps", "2", *learned)
    rows = {r["name"]: r for r in json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]}
    assert rows["importance sampling (prior)"]["log_evidence"] < 0  # log c < 0
    run("sample", "constrained", *options, *learned, "--checkpoint", "out/adapter")
    assert "cb\n    0." in capfd.readouterr().out
    lexical = ("--set", "constraint=lexical", "--set", "words=a, bc", "--steps", "2", "--out", "out/train")
    run("train", "constrained", *options[:-2], *lexical)
    assert len((tmp_path / "out" / "train" / "run.jsonl").read_text().splitlines()) == 2
    assert "(no draw of the guide is possible)" in (tmp_path / "out" / "train" / "samples.txt").read_text()
    run("compare", "constrained", *options, "--set", "constraint=lexical", code=1)
    assert "words" in capfd.readouterr().err


def test_arguments_out_of_range(tiny, tmp_path):
    lm, x = tiny
    with pytest.raises(ValueError, match="guide_lm"):
        Constrained(lm, condition=has_letter).guide(x)
    make = EXPERIMENTS["constrained"]
    for options, name in (
        ({"constraint": "rhyme"}, "constraint"), ({"words": "a"}, "words"), ({"labelled": "f"}, "labelled"),
        ({"pattern": "a"}, "pattern"), ({"lm": lm}, "data"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            make(**options)
    (tmp_path / "labelled.txt").write_text("yes\ttext\n")
    with pytest.raises(ValueError, match=r"labelled: .*line 1"):
        read_labelled(tmp_path / "labelled.txt")
