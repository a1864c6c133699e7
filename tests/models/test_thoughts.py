"""Thoughts: plans and trees by plain loops, a tree's path is a chain, what a search weighs, and the embedded sums."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pyro
import pytest
import torch
from five_sigma import assert_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Law, Plain, tokens
from tiny import flat_lm

from lmppl import LanguageModel, text
from lmppl.inference import (
    SMC,
    DetailedBalance,
    Enumeration,
    Importance,
    MetropolisHastings,
    PooledVarGrad,
    Query,
    Sandwich,
    SubTB,
    VarGrad,
    weigh,
)
from lmppl.inference.judging.quality import density_quality
from lmppl.models import EXPERIMENTS, ChainOfThoughts, TreeOfThoughts
from lmppl.models.thoughts import (
    EXAMPLE,
    Asked,
    Judge,
    encode,
    is_right,
    lines,
    read_questions,
    result,
    small_answers,
    small_questions,
    sums,
)

VOCAB = 5  # eos, ".", a, b, c
CHILDREN = (0.3, 0.7)


@pytest.fixture(scope="module")
def lm():
    return flat_lm(vocab=VOCAB)


def written(told: str) -> str:
    """What follows in the small worlds: nothing that anybody drew."""
    return "c" if told.endswith("a") else ""


def likes(lm, told):
    return text.map(lambda s: 0.7 * s.count("b") - 0.2 * len(s), told, lm).double()


def world(lm, kind, **options):
    """Thoughts of one token, or with ``stop`` of one token at most; two steps."""
    given = {"max_tokens": 1, "after": written, "evaluate": lambda told: likes(lm, told), "marks": ("b", "c")}
    return kind(lm, lm, **{**given, "ask": "a", "stop_answer": "eos", "template": "{y}{x}", **options})


class Loop:
    """The same by plain loops over strings of one letter a token."""

    def __init__(self, lm, task, y: str):
        self.lm, self.task, self.plain = lm, task, Plain(lm)
        self.y = tokens(lm.encode(y, stop="eos"))

    def ids(self, told: str) -> tuple[int, ...]:
        return tokens(self.lm.encode(told))

    def follow(self, told: str) -> str:
        return told + written(told)

    def thoughts(self, told: str) -> dict[str, float]:
        """Each thought as it is told, with its log-probability."""
        stops = () if self.task.stop is None else (self.lm.eos_id,)
        law = Law(self.plain, self.ids(told), 1, stops=stops).support()
        return {self.lm.decode(torch.tensor(z)): log_p for z, log_p in law.items()}

    def more(self, told: str) -> dict[bool, float]:
        on, end = (self.lm.token_id(mark) for mark in self.task.marks)
        law = Law(self.plain, self.ids(told), 1, stops=(), allowed=lambda prefix: {on, end}).support()
        return {True: law[(on,)], False: law[(end,)]}

    def value(self, told: str) -> float:
        return 0.7 * told.count("b") - 0.2 * len(told)

    def answer(self, told: str) -> float:
        return Law(self.plain, self.ids(told + "a"), 1).log_prob(self.y)

    def plans(self, told: str, d: int = 1) -> dict[tuple[str, ...], float]:
        """Every plan, its thoughts, with its log joint."""
        found = {}
        for z, log_p in self.thoughts(told).items():
            read = self.follow(told + z)
            more = {False: 0.0} if d == self.task.steps else self.more(read)
            for on, log_more in more.items():
                state = self.follow(read + self.task.marks[not on])
                log_joint = log_p + log_more + self.value(state)
                if on:
                    found |= {(z, *rest): log_joint + x for rest, x in self.plans(state, d + 1).items()}
                else:
                    found[z,] = log_joint + self.answer(state)
        return found

    def chains(self, told: str, d: int = 1) -> dict[tuple[str, ...], float]:
        """Every path of ``steps`` thoughts, with its log joint."""
        if d > self.task.steps:
            return {(): self.answer(told)}
        found = {}
        for z, log_p in self.thoughts(told).items():
            state = self.follow(self.follow(told + z) + self.task.marks[d == self.task.steps])
            found |= {(z, *rest): log_p + self.value(state) + x for rest, x in self.chains(state, d + 1).items()}
        return found


def normalised(log_joint):
    total = math.log(sum(map(math.exp, log_joint.values())))
    return total, {key: math.exp(x - total) for key, x in log_joint.items()}


def paths(posterior, i, steps, most):
    """The marginal of the path through a tree, from the joint of all its sites."""
    names = [f"{kind} {d}" for d in range(1, steps + 1) for kind in ("expand", *(f"thought:{c}" for c in range(most)))]
    names = [n if ":" not in n else f"thought {n.split()[1]}.{int(n.split(':')[1].split()[0]) + 1}" for n in names]
    found = Counter()
    for values, p in posterior.table(names, i):
        of = dict(zip(names, values, strict=True))
        key = tuple(of[f"thought {d}.{int(of[f'expand {d}']) + 1}"] for d in range(1, steps + 1))
        found[key] += p
    return found


QUESTIONS, ANSWERS = ("ab", "b"), ("b", "")


@pytest.mark.parametrize("stop", [None, "eos"])
def test_the_posterior_of_plans_is_that_of_plain_loops(lm, stop):
    """Of one step or two; thoughts that are not there are empty, once."""
    task = world(lm, ChainOfThoughts, stop=stop)
    x, y = lm.encode(list(QUESTIONS)), lm.encode(list(ANSWERS), stop="eos")
    exact = Enumeration(task.model).run(x, y)
    for i in range(2):
        loop = Loop(lm, task, ANSWERS[i])
        log_z, truth = normalised(loop.plans(loop.follow(QUESTIONS[i])))
        assert float(exact.log_evidence[i]) == pytest.approx(log_z, abs=1e-6)
        found = Counter()
        for (first, more, second), p in exact.table(["thought 1", "more 1", "thought 2"], i):
            found[(first, second) if more == "b" else (first,)] += p
            assert more == "b" or not second
        assert found == pytest.approx(truth, abs=1e-6) and any(len(plan) == 1 for plan in truth)


@pytest.mark.parametrize("stop", [None, "eos"])
@pytest.mark.parametrize("children", [(1.0,), CHILDREN])
def test_the_path_of_a_tree_is_a_chain_by_plain_loops(lm, stop, children):
    """Evidence and the path's posterior do not depend on how many children there are, whose number keeps its prior."""
    task = world(lm, TreeOfThoughts, children=children, stop=stop)
    x, y = lm.encode(list(QUESTIONS)), lm.encode(list(ANSWERS), stop="eos")
    exact = Enumeration(task.model).run(x, y)
    for i in range(2):
        loop = Loop(lm, task, ANSWERS[i])
        log_z, truth = normalised(loop.chains(loop.follow(QUESTIONS[i])))
        assert float(exact.log_evidence[i]) == pytest.approx(log_z, abs=1e-6)
        if len(children) == 1:
            found = dict(exact.table(["thought 1.1", "thought 2.1"], i))
        else:
            found = paths(exact, i, 2, 2)
            assert dict(exact.table("children 2", i)) == pytest.approx({0: CHILDREN[0], 1: CHILDREN[1]}, abs=1e-6)
        assert found == pytest.approx(truth, abs=1e-6)


def trees():
    return st.tuples(
        st.lists(st.floats(0.1, 1.0), min_size=1, max_size=3).map(lambda x: [p / sum(x) for p in x]),
        st.integers(0, 50),
        st.lists(st.floats(-2.0, 2.0), min_size=3, max_size=3),
    )


@settings(max_examples=8, deadline=None)
@given(trees())
def test_a_trees_evidence_is_its_chains_on_random_small_models(drawn):
    """Any number of children, any evaluation, any language model."""
    children, seed, score = drawn
    lm = flat_lm(vocab=4, seed=seed)
    x, y = lm.encode(["a", "b"]), lm.encode(["a", "b"], stop="eos")

    def evaluate(told):
        return text.map(lambda s: sum(v * s.count(c) for v, c in zip(score, "ab.", strict=True)), told, lm)

    def evidence(children):
        task = world(lm, TreeOfThoughts, children=children, evaluate=evaluate, steps=1, marks=("", "b"))
        return Enumeration(task.model).run(x, y).log_evidence

    assert torch.allclose(evidence(children), evidence([1.0]), atol=1e-6)


@pytest.mark.parametrize("searched", [False, True])
def test_a_search_weighs_by_its_mean_evaluations(lm, searched):
    """u = sum_d log mean_i e^(v_di) + log p(y | s), whichever child it went on with: the model proposes by search."""
    task = world(lm, TreeOfThoughts, children=CHILDREN)
    x, y = lm.encode(list(QUESTIONS)), lm.encode(list(ANSWERS), stop="eos")
    pyro.set_rng_seed(0)
    drawn = weigh(Query(task.model, task.search if searched else None, (x, y)), 30)
    value = {name: v for name, v in drawn.values.items()}
    seen = Counter()
    for n, i in product(range(30), range(2)):
        loop = Loop(lm, task, ANSWERS[i])
        told, u = loop.follow(QUESTIONS[i]), 0.0
        for d in (1, 2):
            count = int(value[f"children {d}"][n, i]) + 1
            states = []
            for c in range(count):
                z = lm.decode(value[f"thought {d}.{c + 1}"][n, i])
                states.append(loop.follow(loop.follow(told + z) + task.marks[d == 2]))
            assert count == 2 or not tokens(value[f"thought {d}.2"][n, i])
            u += math.log(sum(math.exp(loop.value(s)) for s in states) / count)
            told = states[int(value[f"expand {d}"][n, i])]
            seen[count] += 1
        assert float(drawn.u[n, i]) == pytest.approx(u + loop.answer(told), abs=1e-5)
    assert min(seen[1], seen[2]) > 10


ALGORITHMS = {
    "importance": lambda t, n: Importance(t.model, num_particles=n),
    "search": lambda t, n: Importance(t.model, t.search, num_particles=n),
    "guide": lambda t, n: Importance(t.model, t.guide, num_particles=n),
    "SMC": lambda t, n: SMC(t.model, num_particles=n),
    "SMC that searches": lambda t, n: SMC(t.model, t.search, num_particles=n),
    "SMC, guide": lambda t, n: SMC(t.model, t.guide, num_particles=n),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_evidence_of_a_tree_is_unbiased(lm, name):
    """Means of 400 runs of 8 particles within five standard errors; the copies of a question run apart."""
    task, copies = world(lm, TreeOfThoughts, children=CHILDREN), 400
    x, y = lm.encode(["ab"] * copies), lm.encode(["b"] * copies, stop="eos")
    truth = float(Enumeration(task.model).run(x[:1], y[:1]).log_evidence.exp())
    pyro.set_rng_seed(0)
    found = ALGORITHMS[name](task, 8).run(x, y).log_evidence.exp().double()
    assert abs(float(found.mean()) - truth) < 5 * float(found.std()) / copies**0.5


@pytest.mark.parametrize("kind", [ChainOfThoughts, TreeOfThoughts])
def test_chains_that_regrow_branches_end_at_the_posterior(lm, kind):
    """The last states of 800 chains, within five standard errors; a mark or a number of children says what is there."""
    task = world(lm, kind)
    x, y = lm.encode(["ab"]), lm.encode(["b"], stop="eos")
    exact = Enumeration(task.model).run(x, y)
    n = 800
    pyro.set_rng_seed(0)
    chains = MetropolisHastings(task.model, num_chains=n, num_samples=1, warmup=40, moves="branch").run(x, y)
    sites = ["thought 1", "more 1"] if kind is ChainOfThoughts else ["children 1", "expand 1", "children 2"]
    truth, found = dict(exact.table(sites, 0)), dict(chains.table(sites, 0))
    assert found.keys() <= truth.keys()
    count = torch.tensor([n * found.get(key, 0.0) for key in truth]).round()
    assert_counts(count, torch.tensor(list(truth.values()), dtype=torch.float64), n)


def test_one_site_at_a_time_no_number_of_children_changes(lm):
    """A second child that was not there is impossible with no token; what was there, with one: `branch` is needed."""
    task = world(lm, TreeOfThoughts, children=CHILDREN, steps=1, marks=("", "b"))
    x, y = lm.encode(["ab"]), lm.encode(["b"], stop="eos")
    pyro.set_rng_seed(0)
    for moves, still in {"regrowth": True, "branch": False}.items():
        run = MetropolisHastings(task.model, num_chains=40, num_samples=20, warmup=0, moves=moves).run(x, y)
        numbers = run.samples["children 1"].view(40, 20)
        assert bool((numbers == numbers[:, :1]).all()) is still


@pytest.mark.parametrize("stop", [None, "eos"])
@pytest.mark.parametrize("objective", [VarGrad, PooledVarGrad, SubTB, DetailedBalance])
def test_texts_that_are_not_there_are_terms_of_no_objective(lm, objective, stop):
    """A guide that is the model has u = 0 everywhere: at plans of one step too, whose second thought is empty."""
    task = world(lm, ChainOfThoughts, stop=stop)
    x = lm.encode(list(QUESTIONS))

    def program(x):
        with pyro.plate("questions", len(x)):
            task.plan(lm, x, lambda told: told, evaluated=False)

    pyro.set_rng_seed(0)
    trained = objective(num_particles=16)
    drawn = trained.draw(program, program, (x,), {})
    assert 0 < int((drawn["more 1"][..., 0] == lm.token_id("b")).sum()) < 32
    for b in trained.balances(program, program, (x,), {}, drawn):
        assert float(b.u.detach()[b.valid].abs().max()) < 1e-9 and bool(b.last.any(0).all())


def test_bounds_from_both_sides_of_a_trees_evidence(lm):
    """A draw of the chain's posterior, siblings around it: E[1 / Z] of conditional SMC is 1 / Z, 5 standard errors."""
    task, copies = world(lm, TreeOfThoughts, children=CHILDREN), 200
    chain = world(lm, TreeOfThoughts, children=[1.0])
    x, y = lm.encode(["ab"] * copies), lm.encode(["b"] * copies, stop="eos")
    exact = Enumeration(chain.model).run(x, y)
    pyro.set_rng_seed(0)
    path = exact.resample(1, "multinomial").values
    values = task.around(x, [path[f"thought {d}.1"][0] for d in (1, 2)])
    bounds = Sandwich(task.model, num_particles=4).run(x, y, exact_sample=values)
    for estimates, sign in ((bounds.lowers[0], 1), (bounds.uppers[0], -1)):
        ratio = (sign * (estimates - exact.log_evidence)).exp().double()
        assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / copies**0.5
    assert float(bounds.lowers.mean()) < float(exact.log_evidence[0]) < float(bounds.uppers.mean())


def test_plans_none_of_which_goes_on(lm):
    """All later texts are of no tokens, in every particle: they are resampled and tabled like any other."""
    task = world(lm, ChainOfThoughts)
    x, none = lm.encode(["ab", "b"]), torch.zeros(2, dtype=torch.bool)

    def model():
        with pyro.plate("questions", 2):
            z = pyro.sample("z", task.thought(lm, x, ~none))
            w = pyro.sample("w", task.thought(lm, x, none))
            pyro.factor("likes b", 2.0 * (z[..., 0] == lm.token_id("b")))
            v = pyro.sample("v", task.thought(lm, lm.join(x, z, w), ~none))
            pyro.factor("likes c", 2.0 * (v[..., 0] == lm.token_id("c")))

    pyro.set_rng_seed(0)
    found = SMC(model, num_particles=50, ess_threshold=1.0).run()
    assert found.ancestry and found.samples["w"].shape == (50, 2, 0)
    assert found.resample(9).table("w", 0) == [("", pytest.approx(1.0))]
    exact = Enumeration(model).run()
    assert bool(((found.log_evidence - exact.log_evidence).abs() < 1.0).all())


def test_an_answer_that_is_queried(lm):
    """Its distribution is the evidence with it over the evidence without; the search asks it, too."""
    task = world(lm, TreeOfThoughts, steps=1, marks=("", "b"))
    x = lm.encode(["ab"])
    exact = Enumeration(task.model).run(x)
    asked = dict(exact.table("y", 0))
    for y in ("a", ""):
        observed = Enumeration(task.model).run(x, lm.encode([y], stop="eos")).log_evidence
        assert asked[y] == pytest.approx(float((observed - exact.log_evidence).exp()), abs=1e-6)
    assert "y" in Importance(task.model, task.search, num_particles=4).run(x).samples


def test_bad_arguments_are_refused(lm):
    with pytest.raises(ValueError, match="children"):
        TreeOfThoughts(lm, children=[0.5, 0.6])
    with pytest.raises(ValueError, match="steps"):
        ChainOfThoughts(lm, steps=0)
    with pytest.raises(ValueError, match="allowed"):
        ChainOfThoughts(lm, stop=".", allowed=lambda prefix: prefix)
    for kind in (ChainOfThoughts, TreeOfThoughts):
        with pytest.raises(ValueError, match="guide_lm"):
            kind(lm).guide(lm.encode(["a"]), lm.encode(["b"]))
    with pytest.raises(ValueError, match="reliable"):
        Judge(lm, 1.0)
    with pytest.raises(ValueError, match="children"):
        EXPERIMENTS["thoughts"](children=0)
    with pytest.raises(ValueError, match="data"):
        EXPERIMENTS["thoughts"](lm)


# -- the embedded sums -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arithmetic():
    return LanguageModel.embedded("arithmetic")


def test_the_small_world_is_frozen(arithmetic):
    train, held_out, test = small_questions()
    assert (len(train), len(held_out), len(test)) == (76, 16, 16)
    assert len({*train, *held_out, *test}) == 108 == 27 * 4
    assert test[0].x == "Question: 1 + 1 + 1 = ? Answer:"
    given = small_answers()
    assert [len(asked) for asked in given] == [76 * 13, 16, 16] and given == small_answers()
    assert [int(a.answer) for a in given[2]] == [3, 7, 1, -1, 7, -1, -2, -1, 6, 1, 7, 2, 0, 8, -3, 7]
    assert sum(int(a.answer) == q.answer for a, q in zip(given[2], test, strict=True)) == 8
    judge = Judge(arithmetic)
    told = [q.x + q.chain for q in train + held_out + test]
    assert all(map(is_right, told))
    found = sum(map(judge.verdict, told))
    assert found == 89  # of 108: the judge errs in 19


def test_a_chain_is_told_as_the_arithmetic_lm_knows_it(arithmetic):
    """Results, values and marks are written by the program; the path of right thoughts is the right chain."""
    task = TreeOfThoughts(**sums(arithmetic), children=[1.0])
    (q,) = small_questions()[2][:1]
    told = task.follow(arithmetic.encode([q.x]))
    for d, (sign, n) in enumerate(zip(q.signs, q.operands[1:], strict=True), 1):
        told = task.follow(arithmetic.join(told, f" {sign} {n}"))
        told = task.follow(arithmetic.join(told, task.marks[d == 2]))
    assert arithmetic.decode(told) == [q.x + q.chain]
    assert [result(s) for s in ("Question: 3 - 1 = ? Answer:", "3 + 2", "3 - 4 = -1,", "3 - 1 = 2.")] == [
        " 3", " = 5", " -1", "",
    ]  # fmt: skip


def test_a_judges_doubt(arithmetic):
    """Its scores are the log odds of being right, and it says the same whenever asked."""
    judge = Judge(arithmetic, 0.8)
    told = [q.x + q.chain for q in small_questions()[0]]
    v = judge(arithmetic.encode(told))
    assert {round(x, 4) for x in v.tolist()} == {0.0, round(math.log(0.25), 4)}
    assert [x == 0 for x in v.tolist()] == [judge.verdict(s) for s in told]
    assert torch.equal(v, judge(arithmetic.encode(told)))


def test_the_experiment_and_its_tree(arithmetic):
    """The exact posterior has all of the prior; the guide starts as the language model that has read the answer."""
    for children, support in ((1, 258), (2, 6084)):
        e = EXPERIMENTS["thoughts"](children=children)
        exact = e.exact.run(*(given[:1] for given in e.test))
        assert exact.num_particles == support and float(exact.unexplored[0]) == pytest.approx(0.0, abs=1e-6)
        assert e.site in exact.samples
    assert EXPERIMENTS["thoughts"](children=3).exact is None


def density_tv(e, exact, args):
    return float(density_quality(exact, e.guide, args, {}).total_variation.mean())


@pytest.mark.slow
def test_a_short_training_comes_closer_to_the_posterior_of_plans():
    e = EXPERIMENTS["thoughts"]()
    exact = e.exact.run(*e.test)
    before = density_tv(e, exact, e.test)
    e.gflownet().fit(e.batches, 40, progress=False)
    e.gflownet().fit(e.batches, e.recipe.quick_steps, progress=False)
    assert density_tv(e, exact, e.test) < 0.8 * before


def test_questions_are_read_from_a_file(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("How many?\t3\nAnd now?\t 4 \n")
    assert read_questions(path) == [Asked(EXAMPLE.format(q=q), a) for q, a in (("How many?", "3"), ("And now?", "4"))]
    path.write_text("How many? 3\n")
    with pytest.raises(ValueError, match="a tab and an answer"):
        read_questions(path)


@torch.no_grad()
def test_a_tree_on_a_pretrained_language_model_that_evaluates_itself(smollm2_lm):
    """Its evaluations are those of plain passes; importance sampling and SMC by trees of two children, one problem."""
    lm = smollm2_lm
    task = TreeOfThoughts(**lines(lm, max_tokens=10), children=[0.0, 1.0])
    evaluate = task.evaluate
    question = "Tom has 6 eggs and eats 2. Then he buys 5. How many has he?"
    x, y = encode(lm, [Asked(EXAMPLE.format(q=question), "9")])
    found = {}
    for step in (" 6 - 2 = 4", " 6 - 2 = 5", " 6 + 2 = 8"):
        told = lm.join(x, f"{step}\n-")
        logits = lm.forward(lm.join(told, evaluate.asked), use_cache=False).logits[0, -1]
        found[step] = float(evaluate(told)[0])
        assert found[step] == pytest.approx(float(logits[[evaluate.yes, evaluate.no]].log_softmax(-1)[0]), abs=1e-3)
    pyro.set_rng_seed(0)
    before = lm.tokens_scored
    drawn = weigh(Query(task.model, None, (x, y)), 2)
    tokens_of_it = lm.tokens_scored - before
    log_z = float(drawn.u.logsumexp(0)) - math.log(2)
    smc = SMC(task.model, num_particles=2).run(x, y)
    print(found, tokens_of_it, log_z, float(smc.log_evidence), lm.decode(drawn.values["thought 1.1"]))
    assert bool(drawn.u.isfinite().all()) and abs(float(smc.log_evidence) - log_z) < 12.0
    assert all(s.endswith("\n") for s in sum(lm.decode(drawn.values["thought 1.1"]), []))
    chain = ChainOfThoughts(**lines(lm, max_tokens=10), steps=2)
    ended = Importance(chain.model, num_particles=2).run(x, y).samples["more 1"]
    assert set(sum(lm.decode(ended), [])) <= {"-", "="}
