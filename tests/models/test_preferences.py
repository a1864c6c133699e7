"""Preferences: who the annotators are and what they would read, by plain loops; the mixture; the command line."""

from __future__ import annotations

import json
import math
import sys
from itertools import product

import pyro
import pytest
import torch
from five_sigma import assert_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from precision import single
from pyro import poutine
from reference import Law, Plain, tokens
from tiny import tiny_lm

from benchmarks.paper.preferences import World, preferred, sorts
from lmppl import cli
from lmppl.embedded.stories import middles
from lmppl.inference import SMC, Enumeration, Importance
from lmppl.inference.judging.quality import density_quality
from lmppl.models import EXPERIMENTS, Annotators, Preferences
from lmppl.models.constrained import beginnings
from lmppl.models.preferences import (
    GROUPS,
    KINDS,
    Choice,
    choices,
    differences,
    flat,
    infer,
    parsed,
    pooled,
    read_choices,
)
from lmppl.models.programs.preferences import features, one_of_each

MAX_TOKENS = 3
PROPERTIES = {"short": ["a", "b", "c"], "ab": ["ab", "ba", "aba"]}
number = st.floats(-3.0, 3.0, allow_nan=False)


def matrix(rows: int, columns: int) -> st.SearchStrategy[torch.Tensor]:
    row = st.lists(number, min_size=columns, max_size=columns)
    return st.lists(row, min_size=rows, max_size=rows).map(lambda x: torch.tensor(x, dtype=torch.float64))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# -- who the annotators are ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(matrix(3, 2), matrix(6, 2), st.lists(st.sampled_from([-1, 0, 1]), min_size=6, max_size=6))
def test_the_posterior_of_kinds_is_that_of_plain_loops(tastes, rows, chosen):
    """Two kinds of three tastes, thirds; three annotators, asked twice or less."""
    d, y = rows.view(3, 2, 2), torch.tensor(chosen).view(3, 2)
    annotators = Annotators(tastes, kinds=2, parts=3)
    found = Enumeration(annotators.model).run(d, y)

    def likes(a: int, g: int) -> float:
        """Annotator a's choices, by taste g."""
        total = 1.0
        for j in range(2):
            u = sum(float(tastes[g, f] * d[a, j, f]) for f in range(2))
            total *= {1: sigmoid(u), 0: sigmoid(-u), -1: 1.0}[int(y[a, j])]
        return total

    evidence, next_taste, each = 0.0, [0.0] * 3, [[0.0] * 3 for _ in range(3)]
    for kinds in product(range(3), repeat=2):  # of three thirds the one sorted division is 2, 1
        share = (2 / 3, 1 / 3)
        own = [[s * likes(a, g) for s, g in zip(share, kinds, strict=True)] for a in range(3)]
        joint = math.prod(map(sum, own)) / 9
        evidence += joint
        for k, g in enumerate(kinds):
            next_taste[g] += joint * share[k]
            for a in range(3):
                each[a][g] += joint * own[a][k] / sum(own[a])
    assert found.log_evidence.item() == pytest.approx(math.log(evidence), abs=1e-5)
    assert annotators.next_taste(found).tolist() == pytest.approx([m / evidence for m in next_taste], abs=1e-5)
    of_each = annotators.taste_of_each(found, d, y)
    assert of_each.flatten().tolist() == pytest.approx([p / evidence for row in each for p in row], abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(matrix(2, 2), matrix(3, 2), st.integers(0, 1), st.integers(0, 3))
def test_an_annotators_choices_normalise(tastes, d, taste, s):
    """Over all 8 answers to three questions, whatever shares and kinds; each kind has its share."""
    annotators = Annotators(tastes, kinds=2, parts=7)
    s %= len(annotators.shares)
    held = {"shares": torch.tensor(s), "kind 0": torch.tensor(taste), "kind 1": torch.tensor(1 - taste)}
    total = 0.0
    for answers in product((0, 1), repeat=3):
        run = poutine.trace(poutine.condition(annotators.model, held)).get_trace(d[None], torch.tensor([answers]))
        run.compute_log_prob()
        p = run.nodes["choices"]["log_prob_sum"].exp().item()
        by_kind = [
            math.prod(sigmoid((2 * a - 1) * float(tastes[g] @ row)) for a, row in zip(answers, d, strict=True))
            for g in (taste, 1 - taste)
        ]
        share = float(annotators.shares[s, 0])
        assert p == pytest.approx(share * by_kind[0] + (1 - share) * by_kind[1], abs=1e-6)
        total += p
    assert total == pytest.approx(1.0, abs=1e-6)


def test_choices_that_are_drawn_are_those_of_the_likelihood():
    tastes, d = torch.tensor([[2.0], [-1.0]]), torch.tensor([[[1.0], [0.5]]])
    annotators = Annotators(tastes, kinds=2, parts=4)
    held = {"shares": torch.tensor(0), "kind 0": torch.tensor(0), "kind 1": torch.tensor(1)}
    share = float(annotators.shares[0, 0])
    n = 4000
    pyro.set_rng_seed(0)
    drawn = poutine.condition(annotators.model, held)(d.expand(n, 2, 1))
    answers = list(product((0, 1), repeat=2))
    counts = torch.tensor([(drawn == torch.tensor(a)).all(-1).sum() for a in answers]).double()
    of = [
        [math.prod(sigmoid((2 * a - 1) * w * x) for a, x in zip(y, (1.0, 0.5), strict=True)) for y in answers]
        for w in (2, -1)
    ]
    p = torch.tensor([share * a + (1 - share) * b for a, b in zip(*of, strict=True)]).double()
    assert_counts(counts, p, n, rare=20, cells=4)


def test_shares_are_uniform_on_the_grid_of_the_simplex():
    """Each division of seven parts among three counts once; sorted, as often as it can be written."""
    annotators = Annotators(torch.zeros(2, 1), kinds=3, parts=7)
    every = [s for s in product(range(1, 8), repeat=3) if sum(s) == 7]
    assert annotators.log_shares.exp().sum().item() == pytest.approx(1.0)
    for s, log_p in zip((annotators.shares * 7).round().int().tolist(), annotators.log_shares, strict=True):
        assert s == sorted(s, reverse=True)
        assert log_p.exp().item() == pytest.approx(sum(sorted(o, reverse=True) == s for o in every) / len(every))
    assert annotators.combinations == len(annotators.shares) * 2**3


def test_the_embedded_choices_tell_the_kinds():
    """The gate: frozen before any method ran."""
    told = choices()
    assert told == choices() and len(told) == 400
    assert told[0] == Choice("0.0", "Kate went to the kitchen.", " She got the old cocoa.", " She chose the old piano.")
    assert told[-1] == Choice("2.3", "Eve went to the beach.", " She got the small knife.", " She chose the old gift.")
    train = {x for (x,) in beginnings()[0]}
    assert all(c.prompt in train and {c.chosen, c.rejected} < {*middles(c.prompt)} for c in told)
    people = infer(told, GROUPS)
    names, m, total = list(flat(GROUPS)), people.next_taste, sum(count for count, _ in KINDS)
    assert m.sum().item() == pytest.approx(1.0, abs=1e-5) and not people.posterior.unexplored.any()
    assert people.annotators.combinations == len(people.posterior.log_weights) == 13_824
    found = 0.0
    for count, liked in KINDS:
        asked = torch.tensor([name in liked for name in names])
        (g,) = ((people.annotators.tastes > 0) == asked).all(-1).nonzero()[:, 0]
        assert float(m[g]) == pytest.approx(count / total, abs=0.06)
        found += float(m[g])
    assert found > 0.99
    kinds = [int(c.annotator.split(".")[0]) for c in told[::10]]
    best = people.annotators.taste_of_each(people.posterior, people.d, people.y).argmax(-1).tolist()
    wrong = sum(best[i] != max(range(12), key=lambda g: sum(best[j] == g for j in range(40) if kinds[j] == kinds[i]))
                for i in range(40))  # fmt: skip
    assert wrong <= 2


def test_many_kinds_are_divided_at_once():
    assert Annotators(torch.zeros(2, 1), kinds=10, parts=20).log_shares.exp().sum().item() == pytest.approx(1.0)


def test_what_would_only_broadcast_is_refused():
    """One answer for three questions, one annotator's for all, one weight for all features; y of other numbers."""
    annotators, d = Annotators(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), kinds=2, parts=3), torch.randn(3, 4, 2)
    y = torch.ones(3, 4).long()
    posterior = Enumeration(annotators.model).run(d, y)
    assert Enumeration(annotators.model).run(d.double(), y.bool()).log_evidence == posterior.log_evidence
    asked = (
        ("y", d, y[:, :1]),
        ("y", d, y[:1]),
        ("y", d, y[0]),
        ("y", d, y * -2),
        ("y", d, y * 2),
        ("y", d, y * 0.5),
        ("y", d, y * math.nan),
        ("d", d[..., :1], y),
        ("d", d[0], y),
    )
    for name, *wrong in asked:
        with pytest.raises(ValueError, match=f"{name}: expected"):
            annotators.model(*wrong)
        with pytest.raises(ValueError, match=f"{name}: expected"):
            annotators.taste_of_each(posterior, *wrong)


def test_annotators_need_not_be_asked_equally_often():
    told = [
        Choice("a", "x", "an egg", "a ball"),
        Choice("b", "x", "a ball", "an egg"),
        Choice("a", "y", "it", "an egg"),
    ]
    d, y = differences(told, {"egg": ["egg"], "ball": ["ball"]})
    assert d.tolist() == [[[1, -1], [-1, 0]], [[-1, 1], [0, 0]]] and y.tolist() == [[1, 1], [1, -1]]


@settings(max_examples=20, deadline=None)
@given(matrix(12, 2), st.lists(st.sampled_from([-1, 0, 1]), min_size=12, max_size=12))
def test_the_pooled_utility_is_where_the_posterior_is_flat(rows, chosen):
    d, y = rows.view(4, 3, 2), torch.tensor(chosen).view(4, 3)
    w = pooled(d, y).double().requires_grad_()
    sign = torch.where(y == 1, 1.0, -1.0)
    log_p = (torch.nn.functional.logsigmoid(sign * (d @ w)) * (y >= 0)).sum() - w.square().sum() / 200
    assert torch.autograd.grad(log_p, w)[0].abs().max() < 1e-3


# -- what they would read ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    lm = tiny_lm(vocab=5, seed=2)
    return lm, lm.encode(["ab", "c"])


@pytest.fixture(scope="module")
def laws(tiny):
    """log p(z | x) of every text, for each prompt, by plain loops."""
    lm, x = tiny
    plain, end = Plain(lm), lm.token_id(".")
    return [Law(plain, tokens(p), MAX_TOKENS, stops=(end,)).support() for p in x]


def liking(lm, z: tuple[int, ...]) -> list[float]:
    """Features by the words themselves."""
    word = lm.decode(torch.tensor(z)).removesuffix(".")
    return [float(word in words) for words in PROPERTIES.values()]


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_the_enumerated_target_is_that_of_plain_loops(tiny, laws, beta):
    lm, x = tiny
    w = torch.tensor([[2.0, 0.0], [0.7, -1.5]])
    exact = Enumeration(Preferences(lm, properties=PROPERTIES, beta=beta, max_tokens=MAX_TOKENS).model).run(x, w)
    assert not exact.unexplored.any()
    for i, law in enumerate(laws):
        target = {
            z: p + beta * sum(a * float(b) for a, b in zip(liking(lm, z), w[i], strict=True)) for z, p in law.items()
        }
        log_z = math.log(sum(math.exp(u) for u in target.values()))
        assert exact.log_evidence[i].item() == pytest.approx(log_z, abs=1e-5)
        found = {tokens(z): float(p) for z, p in zip(exact.samples["z"][:, i], exact.probabilities[:, i], strict=True)}
        assert found.keys() == target.keys()
        assert all(found[z] == pytest.approx(math.exp(u - log_z), abs=1e-6) for z, u in target.items())


@settings(max_examples=25, deadline=None)
@given(matrix(4, 2), matrix(2, 2), matrix(4, 1), st.floats(0.05, 0.95))
def test_the_mixture_draws_a_person_and_then_a_text(phi, tastes, logits, share):
    """By loops; the joint m p(z) e^u counts people by Z as well, and is the mixture only where Z is one number."""
    log_p = logits.log_softmax(0)

    class Found:
        next_taste = torch.tensor([share, 1 - share])
        annotators = Annotators(tastes, kinds=2, parts=2)

    world = World(Found, None, None, log_p, phi)
    p = log_p.exp()[:, 0].tolist()
    tilt = [[p[i] * math.exp(sum(float(w[f] * phi[i, f]) for f in range(2))) for i in range(4)] for w in tastes]
    z = [sum(t) for t in tilt]
    mixture = [share * tilt[0][i] / z[0] + (1 - share) * tilt[1][i] / z[1] for i in range(4)]
    assert sum(mixture) == pytest.approx(1.0)
    assert world.mixture()[:, 0].tolist() == pytest.approx(mixture, abs=1e-6)
    if abs(z[0] / z[1] - 1) > 0.05 and max(abs(a / z[0] - b / z[1]) for a, b in zip(*tilt, strict=True)) > 0.05:
        joint = [share * a + (1 - share) * b for a, b in zip(*tilt, strict=True)]
        assert (
            joint[0] / sum(joint) != pytest.approx(mixture[0], abs=1e-9)
            or max(abs(j / sum(joint) - m) for j, m in zip(joint, mixture, strict=True)) > 1e-6
        )


@settings(max_examples=20, deadline=None)
@given(matrix(4, 2), matrix(4, 2), st.lists(st.integers(-2, 2), min_size=4, max_size=4))
def test_how_often_a_text_is_chosen(q, p, levels):
    """Every pair of texts in a loop."""
    q, p, u = q.softmax(0), p.softmax(0), torch.tensor(levels).double()
    found = preferred(q, p, u[:, None])
    for b in range(2):
        pairs = product(range(4), repeat=2)
        expected = sum(float(q[i, b] * p[j, b]) * sigmoid(float(u[i] - u[j])) for i, j in pairs)
        assert found[0, b].item() == pytest.approx(expected, abs=1e-9)


def test_a_text_has_a_property_by_a_whole_word_in_capitals_or_not():
    properties = {"old": ["old"], "egg": ["cake", "Egg"]}
    assert features(" He took the older egg.", properties).tolist() == [0.0, 1.0]
    assert features("Old EGGS.", properties).tolist() == [1.0, 0.0]


@settings(max_examples=20, deadline=None)
@given(matrix(9, 1), st.permutations(range(9)))
def test_every_text_is_of_one_sort(logits, order):
    """Nine texts, one of each sort: a sort's mass is its text's; ten draws find a text, by the sum over how many do."""
    adjectives, things = torch.eye(3).repeat_interleave(3, 0), torch.tensor([[1.0, 0], [0, 1], [0, 0]]).repeat(3, 1)
    phi = torch.cat([adjectives, things], -1)[[*order]].double()
    assert sorts(phi).argmax(-1).tolist() == [*order] and (sorts(phi).sum(-1) == 1).all()
    q = logits.log_softmax(0).exp()

    class Found:
        next_taste = torch.tensor([1.0])
        annotators = Annotators(torch.tensor([[3.0, 0, 0, 0, 0]]), kinds=1, parts=1)

    found = World(Found, None, None, q.log(), phi).figures(q)
    assert [x for row in found["cells"] for x in row] == pytest.approx([float(q[order.index(s)]) for s in range(9)])
    names = list(flat(GROUPS))
    for k, (_, liked) in enumerate(KINDS):
        (i,) = ((phi[:, [names.index(n) for n in liked]] == 1).all(-1)).nonzero()[:, 0].tolist()
        p = float(q[i])
        assert found["kinds"][k] == pytest.approx(p)
        assert found["found"][k] == pytest.approx(
            sum(math.comb(10, n) * p**n * (1 - p) ** (10 - n) for n in range(1, 11))
        )


def test_the_guide_is_told_names_and_reads_them_in_its_prompt(tiny):
    lm, x = tiny
    task = Preferences(lm, lm, properties=PROPERTIES, names={"ab": "b"}, max_tokens=MAX_TOKENS, template="{w}{x}")
    w = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert lm.decode(task.liked(w)) == ["ab", ""]  # a space is an "a" to this tokenizer
    assert [tokens(p) for p in task.proposal(x, w).prompt] == [tokens(lm.encode("abab")), tokens(lm.encode("c"))]
    blind = Preferences(lm, lm, properties=PROPERTIES, max_tokens=MAX_TOKENS, template="{x}")
    assert [tokens(p) for p in blind.proposal(x, w * 0.3 - 1).prompt] == [tokens(p) for p in x]
    with pytest.raises(ValueError, match="names: 'other'"):
        Preferences(lm, properties=PROPERTIES, names={"other": "b"})


def test_tastes_like_at_most_one_of_a_group():
    tastes = one_of_each([3, 2], 1.5)
    assert len({tuple(row) for row in tastes.tolist()}) == len(tastes) == 12
    assert tastes[:, :3].sum(-1).max() == tastes[:, 3:].sum(-1).max() == 1.5 and tastes.unique().tolist() == [0.0, 1.5]


# -- the experiment ------------------------------------------------------------------------------------------------


def test_the_embedded_target_is_enumerated_whole():
    """All 2,304 sentences after unseen prompts; a taste for nothing leaves the language model be."""
    e = EXPERIMENTS["preferences"]()
    seen = {e.lm.decode(row) for step in range(18) for row in e.batches(step)[0]}
    assert len(seen) == 48 and not seen & {*e.lm.decode(e.test[0]), *e.lm.decode(e.held_out[0])}
    assert len(e.test[0]) == 16 and "for who likes: old, cake" in e.describe(0)
    x, w = (given[:2] for given in e.test)
    exact = e.exact.run(x, torch.stack([w[0], torch.zeros_like(w[1])]))
    assert len(exact.samples["z"]) == 2304 and not exact.unexplored.any()
    torch.testing.assert_close(exact.log_prior.exp().sum(0), torch.ones(2), atol=single(10), rtol=0)
    assert exact.log_evidence[0] > 0.1 and abs(float(exact.log_evidence[1])) < 1e-4


@pytest.mark.slow
def test_one_guide_serves_every_taste():
    """By its own recipe: unseen prompts, all three kinds and one who likes nothing, each near its target."""
    e = EXPERIMENTS["preferences"]()
    x, w = (given[[0, 1, 12, 3]] for given in e.test)
    w = torch.cat([w[:3], torch.zeros_like(w[:1])])
    assert len(w.unique(dim=0)) == 4
    exact = e.exact.run(x, w)

    def tv():
        return density_quality(exact, e.guide, (x, w), {}).total_variation

    assert float(tv()[:3].min()) > 0.5
    e.gflownet().fit(e.batches, e.recipe.steps, progress=False)
    assert float(tv().max()) < 0.05


def test_the_command_line(tmp_path, monkeypatch, capfd):
    """With beta = 0 nobody's taste counts: every draw of the prior weighs one."""
    lm = tiny_lm(vocab=6)
    lm.model.save_pretrained(tmp_path / "lm")
    lm.tokenizer.save_pretrained(tmp_path / "lm")
    told = [Choice(who, x, f"{z}.", "c.") for who, z in (("ann", "ab"), ("ben", "b")) for x in ("ab", "ca", "bc", "c")]
    (tmp_path / "choices.jsonl").write_text("\n".join(json.dumps(c._asdict()) for c in told))
    monkeypatch.chdir(tmp_path)
    options = ("--lm", "lm", "--data", "choices.jsonl", "--set", "max_tokens=3", "--set", "properties=ab|ba, b")
    options += ("--set", "kinds=2", "--set", "beta=0")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lmppl", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capfd.readouterr().err

    run("compare", "preferences", *options, "--steps", "2", "--particles", "8")
    rows = {r["name"]: r for r in json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]}
    assert rows["importance sampling (prior)"]["log_evidence"] == pytest.approx(0.0, abs=1e-6)
    run("train", "preferences", *options, "--steps", "2", "--out", "out/train")
    run("sample", "preferences", *options, "--checkpoint", "out/train/adapter", "--particles", "4")
    assert "for who likes:" in capfd.readouterr().out


@pytest.mark.parametrize("line", ["", "{}", "[1]", '{"annotator": "a", "prompt": "b", "chosen": "c"}', "no JSON"])
def test_a_file_that_holds_no_choices(tmp_path, line):
    (tmp_path / "choices.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="data: .*choices.jsonl"):
        read_choices(tmp_path / "choices.jsonl")


def test_a_minority_taste_on_a_pretrained_model(smollm2_lm, capsys):
    """Words that are seldom, prompts of two lengths: evidence and weights by hand; the figures are shown."""
    lm, strength, n = smollm2_lm, 3.0, 48
    task = Preferences(lm, lm, properties={"dogs": ["dog", "dogs", "puppy"], "birds": ["bird", "birds"]}, max_tokens=16)
    x = lm.encode(["On Sunday Tom and Mia went to the park.", "It rained, so they looked out of the window."])
    x, w = x.repeat_interleave(2, 0), strength * torch.eye(2).repeat(2, 1)
    pyro.set_rng_seed(0)
    found = {
        "importance sampling, prior": Importance(task.model, num_particles=n).run(x, w),
        "importance sampling, told": Importance(task.model, task.guide, num_particles=n).run(x, w),
        "SMC, told": SMC(task.model, task.guide, num_particles=n).run(x, w),
    }
    has = {name: (task.features(p.samples["z"]) * w).sum(-1) / strength for name, p in found.items()}
    with capsys.disabled():
        for name, p in found.items():
            share = (p.probabilities * has[name]).sum(0)
            print(f"\n{name}: ESS / N {p.ess / n}, share {share}, of draws {has[name].mean(0)}, log Z {p.log_evidence}")
    prior, told = (found[f"importance sampling, {name}"] for name in ("prior", "told"))
    often = has["importance sampling, prior"].mean(0)
    z = 1 + math.expm1(strength) * often  # of as many draws as there are
    assert prior.log_evidence.tolist() == pytest.approx(z.log().tolist(), abs=1e-4)
    share = (prior.probabilities * has["importance sampling, prior"]).sum(0)
    assert share.tolist() == pytest.approx((math.exp(strength) * often / z).tolist(), abs=1e-4)
    guide = task.proposal(x, w).prompt
    for i in range(4):
        text_, ratio = tokens(told.samples["z"][0, i]), 0.0
        for sign, prompt in ((1, tokens(x[i])), (-1, tokens(guide[i]))):
            with torch.no_grad():
                logits = lm.model(torch.tensor([[*prompt, *text_]])).logits[0].double()
            logits = logits[len(prompt) - 1 : -1]
            if len(text_) > task.max_tokens:  # its stop was certain
                logits = logits[:-1]
            ratio += sign * sum(float(row.log_softmax(-1)[t]) for row, t in zip(logits, text_, strict=False))
        u = float(told.log_weights[0, i]) + math.log(n)
        assert u == pytest.approx(ratio + strength * float(has["importance sampling, told"][0, i]), abs=2e-3)


def test_arguments_out_of_range(tiny):
    lm, x = tiny
    for properties in ("", "a,,b", "a|", "a; ", "a, a"):
        with pytest.raises(ValueError, match="properties"):
            parsed(properties)
    with pytest.raises(ValueError, match="properties"):
        flat(parsed("a, b; a"))
    with pytest.raises(ValueError, match="kinds"):
        infer(choices(), GROUPS, kinds=5)
    for kinds, parts in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match="kinds, parts"):
            Annotators(torch.zeros(2, 2), kinds=kinds, parts=parts)
    for tastes in (torch.zeros(2), torch.zeros(0, 2), torch.zeros(2, 2).long(), torch.tensor([[math.nan]])):
        with pytest.raises(ValueError, match="tastes"):
            Annotators(tastes)
    for strength in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="strength"):
            infer(choices(), GROUPS, strength=strength)
    for words, name in (([], "expected names"), ("ab", "expected a list"), (["a", "b c"], "'b c'"), (["it's"], "it's")):
        for refused in (lambda p: Preferences(lm, properties=p), lambda p: infer(choices(), [p])):
            with pytest.raises(ValueError, match=f"properties: .*{name}"):
                refused({"a": words})
    with pytest.raises(ValueError, match="properties: no choice differs in 'olden'"):
        infer(choices(), parsed("old, olden"))
    with pytest.raises(ValueError, match="kinds: .* numbers"):
        infer([c for c in choices() for _ in range(20)], GROUPS)
    with pytest.raises(ValueError, match="beta"):
        Preferences(lm, properties=PROPERTIES, beta=math.inf)
    task = Preferences(lm, lm, properties=PROPERTIES, max_tokens=MAX_TOKENS)
    with pytest.raises(ValueError, match="guide_lm"):
        Preferences(lm, properties=PROPERTIES).guide(x, torch.zeros(2, 2))
    for w in (torch.zeros(2, 1), torch.zeros(2, 3), torch.zeros(())):
        for program in (task.model, task.guide):
            with pytest.raises(ValueError, match="w: expected"):
                program(x, w)
    for w in ([[1.0, 2.0], [0.0, 0.0]], [[-1.0, 0.0], [0.0, 0.0]]):
        with pytest.raises(ValueError, match="w: the guide"):
            task.guide(x, torch.tensor(w))
    with pytest.raises(ValueError, match="data"):
        EXPERIMENTS["preferences"](lm)
    with pytest.raises(ValueError, match="properties"):
        EXPERIMENTS["preferences"](properties="old, new")
