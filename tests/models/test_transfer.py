"""Transfer: every choice of blanks by plain loops; the tasks; what the guide is told; the command line."""

from __future__ import annotations

import json
import math
import sys

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from precision import single
from reference import Law, Plain, tokens
from tiny import flat_lm, tiny_lm

from benchmarks.paper import STUDIES
from benchmarks.paper.transfer import Truth, proposed, summed
from lmppl import LanguageModel, cli
from lmppl.distributions import TextMixture, TextProduct
from lmppl.embedded.stories import NAMES, OBJECTS, middles
from lmppl.inference import Enumeration, Importance
from lmppl.inference.judging.quality import density_quality
from lmppl.models import EXPERIMENTS, Transfer
from lmppl.models.programs.transfer import Description
from lmppl.models.transfer import (
    FAMILIES,
    TEMPERATURES,
    UNSEEN_TEMPERATURES,
    embedded_tasks,
    parameters,
    read_tasks,
    texts,
    write,
)

MAX_TOKENS = 2
X, Y, W = ("", "b"), ("", "c.", "ab"), ("", "a", "ab.b")


class Words(Transfer):
    """Words written with dots between them, since the tiny tokenizer has no space."""

    def has_one(self, z, w):
        told = [[word for word in self.lm.decode(row).split(".") if word] for row in w]
        said = [[self.lm.decode(t).removesuffix(".") for t in row] for row in z.reshape(-1, *z.shape[-2:])]
        found = [[not of or text in of for text, of in zip(row, told * len(row), strict=False)] for row in said]
        return torch.tensor(found).view(z.shape[:-1])


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(
        st.tuples(*map(st.sampled_from, (X, Y, Y, W)), st.floats(0.3, 3.0)),
        min_size=1,
        max_size=3,
    ),
)
def test_every_choice_of_blanks_is_that_of_plain_loops(seed, tasks):
    """Of random networks, tasks of several kinds in one plate: log Z and every text's probability."""
    lm = flat_lm(vocab=5, seed=seed)
    task = Words(lm, prefix="c", strength=2.5, max_tokens=MAX_TOKENS)
    exact = Enumeration(task.model).run(*task.encode([Description(*t) for t in tasks]))
    plain, dot = Plain(lm), lm.token_id(".")
    for i, (x, y, v, w, T) in enumerate(tasks):
        prompt = tokens(lm.encode("c" + x))
        joint = {}
        for z, log_p in Law(plain, prompt, MAX_TOKENS, stops=(dot,)).support().items():
            log_y = 0.0
            for seen in (y, v):
                told = (*prompt, *z)
                for token in tokens(lm.encode(seen)):
                    log_y += plain.logits(told).log_softmax(0)[token].item()
                    told = (*told, token)
            said = lm.decode(torch.tensor(z)).removesuffix(".")
            wrong = bool(w) and said not in w.split(".")
            joint[z] = (log_p + log_y - 2.5 * wrong) / T
        log_z = math.log(sum(map(math.exp, joint.values())))
        assert exact.log_evidence[i].item() == pytest.approx(log_z, abs=1e-4)
        found = {tokens(z): float(p) for z, p in zip(exact.samples["z"][:, i], exact.probabilities[:, i], strict=True)}
        assert found.keys() == joint.keys()
        assert all(found[z] == pytest.approx(math.exp(u - log_z), abs=1e-5) for z, u in joint.items())


@pytest.fixture(scope="module")
def stories():
    return LanguageModel.embedded("stories")


def test_a_text_has_a_word_as_a_whole(stories):
    task = Transfer(stories)
    z = stories.encode([[" He took the old egg.", " He took the new cake."], [" She got the small bat.", " Tom."]])
    w = stories.encode([" egg bat", ""])
    assert task.has_one(z, w).tolist() == [[True, True], [True, True]]
    w = stories.encode([" cake knife", " cake egg"])
    assert task.has_one(z, w).tolist() == [[False, True], [False, False]]


def test_what_the_guide_is_told(stories):
    task = EXPERIMENTS["transfer"]().model.__self__
    tasks = [
        Description("Tom went to the barn.", " He ate it.", " He baked it.", " cake"),
        Description(y=" He got the old egg. He ate it."),
        Description("Tom went to the barn.", T=2.0),
    ]
    assert stories.decode(task.described(*task.encode(tasks))) == [
        "Ending: He ate it. He baked it.\nNote: cake\nBeginning:Tom went to the barn.",
        "Ending: He got the old egg. He ate it.\nNote:\nBeginning:",
        "Ending:\nNote:!!\nBeginning:Tom went to the barn.",
    ]
    assert len({write(T) for T in (1.0, *TEMPERATURES, *UNSEEN_TEMPERATURES)}) == 7
    blind = Transfer(stories, stories, template="{x}")
    assert stories.decode(blind.described(*task.encode(tasks)))[0] == "Tom went to the barn."


def test_tasks_are_told_in_words_that_the_language_model_tells_apart(stories):
    """Things are, and a temperature's marks; adjectives and places are not: their embeddings point the same way."""
    e = stories.model.get_input_embeddings().weight.detach()
    e = torch.nn.functional.normalize(e - e.mean(0), dim=-1)

    def alike(words):
        own = e[[stories.token_id(w) for w in words]]
        return float((own @ own.T).fill_diagonal_(0.0).sum() / (len(own) * (len(own) - 1)))

    assert alike([f" {o}" for o in OBJECTS]) < 0.3
    assert alike([" small", " old", " new"]) > 0.99 and alike([" kitchen", " barn", " beach"]) > 0.99
    assert alike(["!", "#"]) < 0.9


def test_the_tasks_are_frozen_and_keep_the_unseen_apart():
    own = parameters()
    new_ones = {*own.new_words, *own.new_verbs}
    assert not set(own.words) & new_ones
    for family in FAMILIES:
        train = embedded_tasks(family, "train")
        assert len(train) == (992 if family == "lexical" else 1024) and train == embedded_tasks(family, "train")
        for told, known in train:
            said = " ".join((told.y, told.v, told.w)).replace(".", " ").split()
            assert not new_ones & set(said) and told.T not in UNSEEN_TEMPERATURES
            assert known[0] != known[1]
            assert all(z in middles(told.x) if told.x else any(z.startswith(name) for name in NAMES) for z in known)
            assert not told.w or all(any(f" {word}." in z for word in told.w.split()) for z in known)
        for new in (False, True):
            test = embedded_tasks(family, "test", new=new)
            assert len(test) == 8
            for told, _ in test:
                said = " ".join((told.y, told.v, told.w)).replace(".", " ").split()
                assert bool(new_ones & set(said) or told.T in UNSEEN_TEMPERATURES) == new
        if family in ("infilling", "two endings"):  # places and verbs of test stories are of no training story
            assert not {(t.x, t.y) for t, _ in train} & {(t.x, t.y) for t, _ in embedded_tasks(family, "test")}
    first = Description("Tom went to the beach.", " He tasted it.", " He shared it.")
    assert embedded_tasks("two endings", "test")[0] == (first, (" He chose the small pie.", " He took the new pie."))


def test_both_conditions_are_the_product_over_the_prior():
    """On all 2,368 texts of embedded tasks: p(z | x, y, v) is p(z | x, y) p(z | x, v) / p(z | x), normalised."""
    e = EXPERIMENTS["transfer"]()
    task = e.model.__self__
    tasks = [t for t, _ in embedded_tasks("two endings", "test")[:2]]
    runs = [
        e.exact.run(*task.encode(of))
        for of in (tasks, [t._replace(v="") for t in tasks], [t._replace(y=t.v, v="") for t in tasks])
    ]
    assert all(len(r.samples["z"]) == 2368 and not r.unexplored.any() for r in runs)
    both, one, other = (ordered(r) for r in runs)
    prior = TextProduct([task.prior(task.encode(tasks)[0])], torch.ones(1))
    z = texts(e.lm).texts()
    z = z[distinct_order(z)]
    log_p = prior.log_prob(z[:, None])
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(2), atol=single(10), rtol=0)
    product = (one + other - log_p.double()).log_softmax(0)
    assert (product.exp() - both.exp()).abs().sum(0).max() < 1e-4
    assert (one.exp() - both.exp()).abs().sum(0).max() > 0.5


def distinct_order(z):
    return torch.tensor(sorted(range(len(z)), key=lambda i: z[i].tolist()))


def ordered(run):
    """log p of every text, in the order of their tokens, (K, B)."""
    columns = [run.probabilities[distinct_order(run.samples["z"][:, i]), i] for i in range(run.samples["z"].shape[1])]
    return torch.stack(columns, 1).double().log()


def test_the_sum_of_adapters_adds_their_differences():
    """Of each layer: the weights' difference is the sum of those of the two guides."""
    e = EXPERIMENTS["transfer"]()
    guides = [e.recipe.guide_lm(e.lm, seed) for seed in (1, 2)]
    for guide in guides:
        for k, p in enumerate(guide.trainable_parameters()):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(k))
    view = summed(e, guides)

    def differences(lm):
        layers = [m for m in lm.model.modules() if lm.adapter_name in getattr(m, "lora_A", {})]
        return [m.get_delta_weight(lm.adapter_name) for m in layers]

    expected = [a + b for a, b in zip(*map(differences, guides), strict=True)]
    found = differences(view)
    assert len(found) == len(expected) == 9
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(found, expected, strict=True))


def test_a_proposal_is_judged_by_all_texts():
    """Of the prior: ESS / N is 1 / E_p[p / q], its TV that of the densities, by another enumeration."""
    of = Truth("two endings", False, 1)
    e = EXPERIMENTS["transfer"]()
    task = e.model.__self__
    fn = task.prior(of.args[0])
    found = proposed(of, fn)
    exact = of.exact
    q, p = exact.log_prior.double().exp()[:, 0], exact.probabilities.double()[:, 0]
    assert found["ess"] == pytest.approx(1 / float((p**2 / q).sum()), rel=1e-3)
    assert found["tv"] == pytest.approx(float((p - q).abs().sum()) / 2, abs=1e-4)
    assert found["ess"] < 0.1 and found["tv"] > 0.9


@pytest.mark.slow
def test_the_study_short():
    """Every cell after a few steps: distances are distances, and each claim has a verdict."""
    study = next(s for s in STUDIES if s.name == "transfer")
    found = {cell: [study.run(cell, 0, True)] for cell in study.cells}
    zero = found["guide of four families"][0]["zero-shot"]
    assert len(zero) == 10 and all(0 <= tv <= 1 for tv in zero.values())
    for (run,) in found.values():
        assert all(0 <= tv <= 1 for way in run["learned"].values() for _, tv in way["way"])
        assert all(0 <= f["ess"] <= 1 + 1e-6 for f in run["proposals"].values())
    told = study.report(found)
    assert told.count("seen**") == 7 and "nan" not in told and "| product of guides over the prior |" in told


@pytest.mark.slow
def test_one_guide_serves_the_families_it_was_trained_on():
    """By its own recipe, on unseen tasks of each; two endings, which it never saw, come nearer as well."""
    e = EXPERIMENTS["transfer"]()
    task = e.model.__self__
    sets = {f: task.encode([t for t, _ in embedded_tasks(f, "test")[:3]]) for f in FAMILIES}
    exact = {f: e.exact.run(*args) for f, args in sets.items()}

    def tv():
        return {f: float(density_quality(exact[f], e.guide, sets[f], {}).total_variation.mean()) for f in FAMILIES}

    before = tv()
    e.gflownet().fit(e.batches, e.recipe.steps, progress=False)
    after = tv()
    assert all(before[f] > 0.4 and after[f] < 0.2 for f in ("infilling", "reverse", "lexical")), (before, after)
    assert after["tempered"] < before["tempered"] and after["two endings"] < 0.5 < before["two endings"], (
        before,
        after,
    )


def test_the_command_line(tmp_path, monkeypatch, capfd):
    """Blank tasks ask for what the prior gives: every draw of it weighs one."""
    lm = tiny_lm(vocab=6)
    lm.model.save_pretrained(tmp_path / "lm")
    lm.tokenizer.save_pretrained(tmp_path / "lm")
    tasks = [{"x": x, "T": 1} for x in ("ab", "ba", "cb", "c", "a")]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    monkeypatch.chdir(tmp_path)
    options = ("--lm", "lm", "--data", "tasks.jsonl", "--set", "max_tokens=3")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lmppl", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capfd.readouterr().err

    run("compare", "transfer", *options, "--steps", "2", "--particles", "8")
    rows = {r["name"]: r for r in json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]}
    assert rows["importance sampling (prior)"]["log_evidence"] == pytest.approx(0.0, abs=1e-6)
    run("train", "transfer", *options, "--steps", "2", "--out", "out/train")
    run("sample", "transfer", *options, "--checkpoint", "out/train/adapter", "--particles", "4")


@pytest.mark.parametrize("line", ["", "[1]", '{"x": 1}', '{"z": "a"}', '{"x": "a", "T": "hot"}', "no JSON"])
def test_a_file_that_holds_no_tasks(tmp_path, line):
    (tmp_path / "tasks.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="data: .*tasks.jsonl"):
        read_tasks(tmp_path / "tasks.jsonl")


def test_arguments_out_of_range(stories):
    task = Transfer(stories)
    with pytest.raises(ValueError, match="guide_lm"):
        task.guide(*task.encode([Description("Tom")]))
    for T in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="T: expected positive"):
            task.encode([Description(T=T)])
    for strength in (-1.0, math.inf):
        with pytest.raises(ValueError, match="strength"):
            Transfer(stories, strength=strength)
    with pytest.raises(ValueError, match="data"):
        EXPERIMENTS["transfer"](stories)
    for families in ("infilling, other", "", []):
        with pytest.raises(ValueError, match="families"):
            EXPERIMENTS["transfer"](families=families)


def test_two_endings_are_put_together_on_a_pretrained_model(smollm2_lm, capsys):
    """A product's density is that of plain forward passes; what each proposal is worth is shown."""
    lm, n, powers = smollm2_lm, 32, torch.tensor([1.0, 1.0, -1.0])
    task = Transfer(lm, lm, max_tokens=14, template="Ending:{y}{v}\nThe whole story:{x}")
    told = [
        Description(" Tom went to the kitchen.", y=" He ate it.", v=" He washed his hands."),
        Description(" It rained all day, so Mia and Ann stayed at home.", y=" They laughed.", v=" Then they slept."),
    ]
    both = task.encode(told)
    one, other = (task.encode([Description(t.x, y=y) for t, y in zip(told, ys, strict=True)]) for ys in zip(*(
        (t.y, t.v) for t in told
    ), strict=True))  # fmt: skip
    parts = [task.proposal(*one), task.proposal(*other), task.prior(both[0])]
    fns = {
        "language model": parts[2],
        "told both": task.proposal(*both),
        "mixture": TextMixture(parts[:2], torch.zeros(2)),
        "product over the prior": TextProduct(parts, powers),
    }
    pyro.set_rng_seed(0)
    with capsys.disabled():
        for name, fn in fns.items():

            def guide(*args, fn=fn):
                with pyro.plate("tasks", len(args[0])):
                    pyro.sample("z", fn)

            p = Importance(task.model, guide, num_particles=n).run(*both)
            print(f"\n{name}: ESS / N {(p.ess / n).tolist()}, log Z {p.log_evidence.tolist()}", end="")
    product = fns["product over the prior"]
    z = product.sample()
    found = product.log_prob(z)
    for i in range(2):
        text_, prompts, expected = tokens(z[i]), [tokens(part.prompt[i]) for part in parts], 0.0
        with torch.no_grad():
            logits = [lm.model(torch.tensor([[*prompt, *text_]])).logits[0].double() for prompt in prompts]
        for t, token in enumerate(text_[: task.max_tokens]):  # a stop after so many is certain
            rows = [row[len(prompt) - 1 + t].log_softmax(-1) for row, prompt in zip(logits, prompts, strict=True)]
            mixed = sum(float(a) * row for a, row in zip(powers, rows, strict=True))
            expected += float(mixed.log_softmax(-1)[token])
        assert float(found[i]) == pytest.approx(expected, abs=5e-3)
