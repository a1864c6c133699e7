"""Tools: the calculator against Python's fractions, and inserted tokens against plain loops over tiny models.

The tiny model's tokens are <eos>, 0, 1, "9+" and "1=", so that "9+1=" goes on with the two tokens of "10".
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pyro
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from problems import adapted
from pyro import poutine
from reference import Law, Plain, Tokens, tokens
from tables import Table
from tiny import tiny_lm
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmppl import LanguageModel, text
from lmppl.constraints import Check
from lmppl.distributions import Completion
from lmppl.distributions.insertions import Insertions
from lmppl.inference import SMC, AutoGuide, Enumeration, Importance, PooledVarGrad, SubTB
from lmppl.text import PAD
from lmppl.tools import MAX_DEPTH, Calculator, evaluate
from lmppl.vocabulary import Vocabulary

WORDS = ("<eos>", "0", "1", "9+", "1=")
EOS, ZERO, ONE, NINE_PLUS, ONE_IS = range(5)
GPT2 = Path(__file__).parents[2] / "shared" / "lms" / "gpt2-tokenizer"


def make_lm(seed: int = 0, arch: str = "gpt2") -> LanguageModel:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"9\+|1=|[01]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    return LanguageModel(tiny_lm(arch, vocab=len(WORDS), seed=seed, dtype=torch.float64).model, tokenizer)


LM = make_lm()
PLAIN = Plain(LM)
calculator = Calculator()


def one_after_nine(so_far: str) -> str | None:
    """What it inserts lets the calculator answer."""
    return "1=" if so_far.endswith("9+") else None


def opening(so_far: str) -> str | None:
    return None if so_far else "01"


def always(so_far: str) -> str:
    return "10"


TOOLS = {
    "calculator": (calculator,),
    "two tools": (calculator, one_after_nine),
    "the first that answers": (one_after_nine, lambda s: "0" if s.endswith(("9+", "01")) else ""),
    "from the beginning": (opening, calculator),
    "always": (always,),
    "ones": (lambda s: "11" if s.endswith("9+") else None,),
    "none": (),
}
RULES = {
    "plain": {},
    "min_tokens": {"min_tokens": 3, "temperature": 0.7},
    "two stops": {"stop": ["eos", "0"], "allowed": [EOS, ZERO, ONE, NINE_PLUS, ONE_IS]},
    "no stop": {"stop": None},
    "a constraint": {"allowed": [EOS, ONE, NINE_PLUS, ONE_IS]},
}


@dataclass
class ToolLaw(Law):
    """The law of one text with tools, by a loop over its characters so far."""

    tools: tuple = field(default=())

    def pending(self, prefix: Tokens) -> list[int]:
        pending: list[int] = []
        for n in range(len(prefix) + 1):
            if n and pending:
                pending = pending[1:] if pending[0] == prefix[n - 1] else []
            so_far = "".join(WORDS[i] for i in prefix[:n] if i != EOS)
            answers = [tool(so_far) for tool in self.tools] if not pending else []
            answer = next((a for a in answers if a and set(a) <= set("01=")), "")  # what the vocabulary can spell
            pending = pending or LM.encode(answer).tolist()
        return pending

    def next(self, prefix: Tokens) -> Tensor:
        pending = self.pending(prefix)
        if not pending or len(prefix) >= self.max_tokens:
            return super().next(prefix)
        return torch.tensor([0.0 if v == pending[0] else -torch.inf for v in range(len(WORDS))])

    def tree(self, prefix: Tokens = (), log_p: float = 0.0) -> dict[Tokens, float]:
        """Every text of positive probability, found by growing; `Law.support` would list all strings."""
        if (prefix and prefix[-1] in self.stops) or (not self.stops and len(prefix) == self.max_tokens):
            return {prefix: log_p}
        found = {}
        for v, step in enumerate(self.next(prefix).tolist()):
            if step > -torch.inf:
                found |= self.tree((*prefix, v), log_p + step)
        return found


@cache
def law(tools: str, rules: str = "plain", max_tokens: int = 4, prompt: Tokens = (ONE,)) -> ToolLaw:
    given = dict(RULES[rules])
    stops = {"two stops": (EOS, ZERO), "no stop": ()}.get(rules, (EOS,))
    allowed = given.get("allowed")
    return ToolLaw(
        PLAIN,
        prompt,
        max_tokens,
        given.get("min_tokens", 0),
        stops,
        (lambda prefix: set(allowed)) if allowed else None,
        given.get("temperature", 1.0),
        tools=TOOLS[tools],
    )


@cache
def exact(tools: str, rules: str = "plain", max_tokens: int = 4) -> dict[Tokens, float]:
    return law(tools, rules, max_tokens).tree()


def completion(tools: str, rules: str = "plain", max_tokens: int = 4, lm: LanguageModel = LM, **more) -> Completion:
    return Completion(lm, "1", **{"max_tokens": max_tokens, "tools": TOOLS[tools], **RULES[rules], **more})


def spelled(z: Tensor) -> list[str]:
    return LM.decode(z)


# With two stops "0" is one of them, and tools that write it are refused.
CASES = [(t, r) for t in TOOLS for r in RULES if r != "two stops"] + [("ones", "two stops")]


# -- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tools", "rules"), CASES)
def test_the_law_is_the_plain_loops(tools, rules):
    """Every string of the vocabulary: the same log-probabilities, -inf elsewhere; they sum to one."""
    fn, truth = completion(tools, rules), exact(tools, rules)
    everything = Completion(LM, "1", max_tokens=4, stop=RULES[rules].get("stop", "eos")).enumerate_support()
    with torch.no_grad():
        log_p = fn.log_prob(everything)
    expected = torch.tensor([truth.get(tokens(z), -torch.inf) for z in everything], dtype=torch.float64)
    assert torch.equal(log_p > -torch.inf, expected > -torch.inf)
    assert torch.allclose(log_p.exp(), expected.exp(), atol=1e-12)
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    assert {tokens(z) for z in fn.enumerate_support()} == set(truth)


@pytest.mark.parametrize(("tools", "rules"), CASES)
def test_prefix_scores_are_the_plain_loops(tools, rules):
    fn, truth = completion(tools, rules), exact(tools, rules)
    rows = torch.stack([text.pad(torch.tensor(z), fn.event_shape[0]) for z in truth])
    with torch.no_grad():
        found = fn.prefix_scores(rows)
    by_loops = law(tools, rules)
    width = found.log_probs.shape[-1]
    for z, log_p, log_stop in zip(truth, *found, strict=True):
        expected = by_loops.prefix_log_probs(z, width) if by_loops.stops else [-torch.inf] * width
        assert torch.allclose(log_p.exp(), torch.tensor(expected, dtype=torch.float64).exp(), atol=1e-12)
        for t in range(len(z) - 1 if by_loops.stops else 0):
            if by_loops.pending(z[:t]) and t < by_loops.max_tokens:  # within an insertion nothing can stop
                assert log_stop[t] == log_p[t] == -torch.inf
            else:
                assert log_stop[t].exp() == pytest.approx(float(by_loops.next(z[:t])[z[-1]].exp()))


@pytest.mark.parametrize("tools", [t for t in TOOLS if t != "none"])
def test_inserted_tokens_add_nothing_and_the_others_are_the_language_models(tools):
    fn, free = completion(tools), completion("none")
    z, by_loops = fn.enumerate_support(), law(tools)
    with torch.no_grad():
        by_token, plain = fn.token_log_probs(z), free.token_log_probs(z)
    inserted = torch.tensor(
        [[t < min(len(tokens(r)), 4) and bool(by_loops.pending(tokens(r)[:t])) for t in range(5)] for r in z]
    )
    assert inserted.any() and (by_token[inserted] == 0).all()
    assert torch.equal(by_token[~inserted], plain[~inserted])
    assert torch.equal(fn.log_prob(z), by_token.sum(-1))


def test_a_wrong_result_is_impossible_and_gradients_stay_finite():
    lm = adapted(make_lm())
    fn = Completion(lm, "1", max_tokens=6, tools=[calculator])
    right, wrong, unfinished = LM.encode(["9+1=100", "9+1=110", "9+1=1"], stop="eos")
    assert fn.log_prob(right) > -torch.inf
    assert fn.log_prob(wrong) == fn.log_prob(unfinished) == -torch.inf
    grads = torch.autograd.grad(fn.log_prob(torch.stack([right, wrong])).sum(), lm.trainable_parameters())
    only_right = torch.autograd.grad(fn.log_prob(right), lm.trainable_parameters())
    assert all(bool(g.isfinite().all()) for g in grads) and any(bool(g.any()) for g in only_right)
    # All of it inserted: nothing to learn from.
    certain = Completion(lm, "1", max_tokens=4, tools=[always]).log_prob(LM.encode("1010", stop="eos"))
    assert certain == 0 and not any(bool(g.any()) for g in torch.autograd.grad(certain, lm.trainable_parameters()))


def test_limits_by_row_and_a_batch_of_prompts():
    """An insertion is cut at each row's own limit."""
    limits = torch.tensor([2, 3, 4])
    fn = Completion(LM, ["1", "0", "01"], max_tokens=limits, tools=TOOLS["two tools"])
    z = fn.enumerate_support()
    with torch.no_grad():
        log_p = fn.log_prob(z)  # (K, 3)
    for row, (limit, prompt) in enumerate(zip(limits.tolist(), [(ONE,), (ZERO,), (ZERO, ONE)], strict=True)):
        truth = ToolLaw(PLAIN, prompt, limit, tools=TOOLS["two tools"]).tree()
        assert {tokens(v) for v in z[log_p[:, row] > -torch.inf, row]} == set(truth)
        expected = torch.tensor([truth.get(tokens(v), -torch.inf) for v in z[:, row]], dtype=torch.float64)
        assert torch.allclose(log_p[:, row].exp(), expected.exp(), atol=1e-12)
    assert (log_p > -torch.inf).any(1).all()


# -- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tools", "rules"), CASES)
def test_samples_follow_the_law(tools, rules):
    """Frequencies of 4,000 draws within 5 standard errors; log-probabilities as scored afterwards, and as replayed."""
    pyro.set_rng_seed(1)
    fn, truth, n = completion(tools, rules), exact(tools, rules), 4000
    z, log_p = fn.sample_and_log_prob((n,))
    assert torch.allclose(log_p.exp(), fn.log_prob(z).exp())
    drawn = [tokens(v) for v in z]
    assert set(drawn) <= set(truth)
    for value, log_prob in truth.items():
        p = torch.tensor(log_prob).exp().item()
        assert abs(drawn.count(value) / n - p) <= 5 * (p * (1 - p) / n) ** 0.5 + 1 / n


def test_every_sum_in_a_sample_is_right():
    pyro.set_rng_seed(0)
    z = Completion(LM, "", max_tokens=12, min_tokens=12, temperature=4.0, tools=[calculator]).sample((500,))
    sums = 0
    for s in spelled(z):
        for i in (i for i, c in enumerate(s[:-2]) if c == "="):
            result = calculator(s[: i + 1])
            if result == "10":
                sums += 1
                assert s[i + 1 : i + 3] == result
    assert sums > 100


@pytest.mark.parametrize("keep", range(6))
def test_regrowing_from_within_an_insertion(keep):
    """9+ | 1 = | 1 0 | ..: kept tokens stay, the rest of an insertion follows for certain."""
    fn = completion("two tools", max_tokens=5)
    old = LM.encode("9+1=101", stop="eos")
    pyro.set_rng_seed(2)
    new, log_new = fn.regrow(old.expand(200, -1), keep)
    assert torch.equal(new[:, :keep], old[:keep].expand(200, -1))
    assert torch.allclose(log_new, fn.token_log_probs(new)[:, keep:].sum(-1), atol=1e-9)
    if 0 < keep < 4:
        assert (new[:, :4] == old[:4]).all()
        free = Completion(LM, "19+1=10", max_tokens=1)
        assert torch.allclose(log_new, free.log_prob(new[:, 4:]), atol=1e-9)


def test_broadening_leaves_insertions_as_they_are():
    fn = completion("calculator", max_tokens=5).broadened(temperature=2.0, epsilon=0.2)
    z = fn.enumerate_support()
    with torch.no_grad():
        assert fn.log_prob(z).exp().sum().item() == pytest.approx(1.0, abs=1e-9)
        by_token = fn.token_log_probs(LM.encode("9+1=10", stop="eos"))
    assert by_token[2] == by_token[3] == 0 and (by_token[[0, 1, 4]] < 0).all()


def test_the_cost_is_reading():
    """What an unfinished row needs is read once, inserted or not: the prompt, and every token but the last two."""
    fn = Completion(LM, "1", max_tokens=6, tools=[calculator])
    pyro.set_rng_seed(0)
    before = LM.tokens_scored
    z = fn.sample((200,))
    read = text.length(z).clamp(max=5)  # a stop too, beside rows that go on; nothing at the limit
    assert LM.tokens_scored - before == 1 + read.sum()
    costs = []
    for scorer in (fn, Completion(LM, "1", max_tokens=6)):
        before = LM.tokens_scored
        scorer.log_prob(z)
        costs.append(LM.tokens_scored - before)
    assert costs[0] == costs[1]


def test_tools_are_asked_once_about_each_prefix():
    asked: list[str] = []

    def tool(so_far: str) -> str | None:
        asked.append(so_far)
        return calculator(so_far)

    fn = Completion(LM, "1", max_tokens=5, tools=[tool])
    z = fn.sample((300,))
    fn.expand((7,)).log_prob(z[:, None])
    fn.broadened(2.0).prefix_scores(z)
    assert 10 < len(asked) == len(set(asked))
    assert "9+1=" in asked and "9+1=1" not in asked  # an insertion is under way


# -- inference -------------------------------------------------------------------------------------------------------

RUNS = 400
PRIOR = {"max_tokens": 5, "temperature": 3.0, "tools": TOOLS["two tools"]}
Y = LM.encode("10", stop="eos")


def model(plate: int | None = None, lm: LanguageModel = LM, **prior) -> None:
    """z ~ LM(1) with tools; y ~ LM(z) seen, with tools; and z has a "1" in it."""
    with pyro.plate("runs", plate or 1, dim=-1):
        z = pyro.sample("z", Completion(lm, "1", **{**PRIOR, **prior}))
        pyro.sample("y", Completion(LM, lm.join("0", z), max_tokens=3, tools=[calculator]), obs=Y)
        pyro.factor("f", torch.where((z == ONE).any(-1), 0.0, -1.0).double())


def guide(plate: int | None = None, lm: LanguageModel | None = None, **prior) -> None:
    with pyro.plate("runs", plate or 1, dim=-1):
        pyro.sample("z", Completion(lm or OTHER, "0", **{**PRIOR, "temperature": 4.0, **prior}))


OTHER = make_lm(seed=1, arch="llama")


@cache
def joint() -> dict[Tokens, float]:
    """log p(z, y) by plain loops."""
    prior = ToolLaw(PLAIN, (ONE,), 5, temperature=3.0, tools=TOOLS["two tools"]).tree()
    seen = {z: ToolLaw(PLAIN, (ZERO, *z[:-1]), 3, tools=(calculator,)).log_prob(tokens(Y)) for z in prior}
    return {z: p + seen[z] - (ONE not in z) for z, p in prior.items()}


def log_evidence() -> Tensor:
    return torch.tensor(list(joint().values()), dtype=torch.float64).logsumexp(0)


def test_enumeration_is_exact():
    posterior = Enumeration(model).run()
    assert posterior.log_evidence[0].item() == pytest.approx(log_evidence().item(), abs=1e-8)
    found = {
        tokens(z): w.item()
        for z, w in zip(posterior.samples["z"][:, 0], posterior.log_weights[:, 0], strict=True)
        if w > -torch.inf
    }
    assert set(found) == set(joint())
    assert all(abs(found[z] - p) < 1e-8 for z, p in joint().items())


def within_five_errors(log_evidences: Tensor) -> None:
    ratio = (log_evidences.double() - log_evidence()).exp()
    error = ratio.std() / len(ratio) ** 0.5
    assert error < 0.2 and abs(ratio.mean() - 1) <= 5 * error


@pytest.mark.parametrize("other", [None, "guide", "a guide without tools"])
@pytest.mark.parametrize("twist", [None, "stop"])
def test_smc_evidence(other, twist):
    """Mean of 400 estimates from 8 particles each; of 32 where a guide without tools proposes wrong results too."""
    pyro.set_rng_seed(5)
    proposal = {None: None, "guide": guide, "a guide without tools": lambda n: guide(n, tools=())}[other]
    particles = 32 if other == "a guide without tools" else 8
    within_five_errors(SMC(model, proposal, num_particles=particles, twist=twist).run(RUNS).log_evidence)


@pytest.mark.parametrize("twist", ["stop", "flow"])
def test_a_twist_is_no_worse_than_none(twist):
    """A text that cannot stop, since a tool is writing, keeps its score: with the least one of its group instead, the
    standard deviation of the evidence is 1.6 to 1.8 times Z, and 0.35 without a twist."""
    pyro.set_rng_seed(11)
    log_z = SMC(model, num_particles=64, twist=twist).run(150).log_evidence
    assert (log_z - log_evidence()).exp().std() < 0.5


@pytest.mark.parametrize("proposal", [None, guide])
def test_importance_evidence(proposal):
    pyro.set_rng_seed(6)
    within_five_errors(Importance(model, proposal, num_particles=8).run(RUNS).log_evidence)


def test_a_check_leaves_insertions_alone():
    """Evidence under a check that passes no zero but the calculator's; log W is 0 where a tool has spoken."""
    no_zero = Check(LM, lambda prefix, token: token != ZERO)
    prior = {"allowed": no_zero, "tools": TOOLS["two tools"], "max_tokens": 5, "temperature": 3.0}
    fn = Completion(LM, "1", **prior)
    z = fn.enumerate_support()
    with torch.no_grad():
        log_p = fn.log_prob(z)
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    has_ten = [("10" in s) for s in spelled(z)]
    truth = log_p.exp()[has_ten].sum()

    def program() -> None:
        with pyro.plate("runs", RUNS, dim=-1):
            z = pyro.sample("z", fn)
            ten = ((z[..., :-1] == ONE) & (z[..., 1:] == ZERO)).any(-1)
            pyro.factor("ten", torch.where(ten, 0.0, -torch.inf))

    pyro.set_rng_seed(7)
    estimates = SMC(program, num_particles=20).run().log_evidence.exp().double()
    error = estimates.std() / RUNS**0.5
    assert error < 0.2 * truth and abs(estimates.mean() - truth) <= 5 * error


@pytest.mark.parametrize("objective", [PooledVarGrad, SubTB])
def test_objectives_vanish_at_the_posterior_and_equal_a_double_loop(objective):
    values = torch.stack([text.pad(torch.tensor(z), 6) for z in joint()])

    def posterior() -> None:
        with pyro.plate("runs", 1, dim=-1):
            pyro.sample("z", Table(LM, values, torch.tensor(list(joint().values()), dtype=torch.float64)))

    pyro.set_rng_seed(8)
    assert abs(objective(num_particles=20).loss(model, posterior)) < 1e-9

    # A language model with an adapter and the same tools, by loops over prefixes and samples.
    lm = adapted(LM)
    q = Completion(lm, "0", **PRIOR)

    def learner() -> None:
        with pyro.plate("runs", 1, dim=-1):
            pyro.sample("z", q)

    pyro.set_rng_seed(9)
    loss, (b,) = objective(num_particles=12).loss_and_balances(model, learner)
    pyro.set_rng_seed(9)
    drawn = objective(num_particles=12).draw(model, learner, (), {})["z"][:, 0]
    prior = ToolLaw(PLAIN, (ONE,), 5, temperature=3.0, tools=TOOLS["two tools"])
    u, skipped = {}, 0
    for n, z in enumerate(tokens(v) for v in drawn):
        for t in range(len(z)):
            cut = (*z[:t], EOS)
            if prior.pending(z[:t]) and t < 5:  # it cannot stop here, in the model or in the guide
                skipped += 1
                assert not b.valid[t, n, 0] and prior.log_prob(cut) == -torch.inf
                continue
            log_p = joint()[cut]
            u[n, t] = log_p - q.log_prob(torch.tensor(cut))
    assert skipped > 0 and int(b.valid.sum()) == len(u)
    if objective is SubTB:
        per_sample = []
        for n in range(12):
            own = [u[k] for k in u if k[0] == n]
            pairs = [(i - j) ** 2 for i, j in combinations(own, 2)]
            per_sample.append(torch.stack(pairs).mean() if pairs else torch.zeros(()))
        expected = torch.stack(per_sample).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        params = lm.trainable_parameters()
        for a, e in zip(torch.autograd.grad(loss, params), torch.autograd.grad(expected, params), strict=True):
            assert (a - e).abs().max() < 1e-6 * (1 + e.abs().max())
    else:
        assert loss > 1e-3


def test_replayed_values_weigh_the_same():
    pyro.set_rng_seed(3)
    drawn = poutine.trace(guide).get_trace(5)
    again = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(5)
    z = again.nodes["z"]["value"]
    prior = ToolLaw(PLAIN, (ONE,), 5, temperature=3.0, tools=TOOLS["two tools"])
    expected = torch.tensor([prior.log_prob(tokens(v)) for v in z], dtype=torch.float64)
    assert torch.allclose(again.nodes["z"]["fn"].log_prob(z), expected)


def test_an_automatic_guide_has_the_models_tools():
    pyro.set_rng_seed(4)
    found = AutoGuide(model, LoraConfig(r=2, target_modules="all-linear"), separator="")
    log_u = Importance(model, found, num_particles=50).run(2).log_weights
    assert bool(log_u.isfinite().all())


# -- bad tools -------------------------------------------------------------------------------------------------------


def test_bad_tools_are_refused():
    with pytest.raises(ValueError, match="tools: expected functions"):
        Completion(LM, "1", max_tokens=3, tools=["calculator"])
    with pytest.raises(ValueError, match="tools: .* answered 7 to ''"):
        Completion(LM, "1", max_tokens=3, tools=[lambda s: 7]).sample()
    with pytest.raises(ValueError, match="tools: .* a stop of this text"):
        Completion(LM, "1", max_tokens=3, stop=["eos", "0"], tools=[always]).sample()
    for kwargs in ({"trigger": ""}, {"format": "x"}, {"format": "{}{}"}, {"max_length": 0}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            Calculator(**kwargs)


def test_a_tool_with_a_trigger_is_asked_only_after_it():
    asked = {"with": [], "without": []}

    def without(so_far: str) -> str | None:
        asked["without"].append(so_far)
        return calculator(so_far)

    class With:
        trigger = "="

        def __call__(self, so_far: str) -> str | None:
            asked["with"].append(so_far)
            return calculator(so_far)

    one, other = (Completion(LM, "1", max_tokens=6, tools=[tool]) for tool in (With(), without))
    pyro.set_rng_seed(0)
    z = other.sample((200,))
    assert torch.equal(one.log_prob(z), other.log_prob(z)) and bool(one.log_prob(z).isfinite().all())
    assert {s for s in asked["with"] if s} == {s for s in asked["without"] if s.endswith("=")} != set()


@pytest.mark.skipif(not GPT2.is_dir(), reason=f"no tokenizer in {GPT2}")
def test_the_ending_of_a_text_by_its_last_token():
    tokenizer = AutoTokenizer.from_pretrained(GPT2)
    vocabulary = Vocabulary(tokenizer, None, len(tokenizer))
    generator = torch.Generator().manual_seed(0)
    known = 0
    for row in torch.randint(len(tokenizer), (500, 3), generator=generator).tolist():
        ending = vocabulary.ending(row[-1])
        assert not ending or vocabulary.decode(row).endswith(ending)
        known += bool(ending)
    assert known > 450 and vocabulary.ending(tokenizer.eos_token_id) == ""
    partial = tokenizer("\N{ABACUS}")["input_ids"]
    assert len(partial) > 1 and vocabulary.ending(partial[-1]) == ""


# -- the calculator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("so_far", "answer"),
    [
        ("3+4=", "7"),
        ("3 + 4 =", " 7"),
        ("6 - 0 =, 6 - 4 =", " 2"),
        ("1-9=", "-8"),
        ("so 2*(3+4)=", "14"),
        ("so: 2*(3+4)=", "14"),
        ("7/2*4=", "14"),
        ("-2*-3=", "6"),
        ("1+2=3+4=", "7"),
        ("Step 1. 3+4=", "7"),
        ("x\n3+4=", "7"),
        ("007+1=", "8"),
        ("3+4", None),
        ("3+4= ", None),
        ("3+4=7", None),
        ("=", None),
        ("", None),
        ("12=", None),
        ("-3=", None),
        ("7/2=", None),
        ("1/0=", None),
        ("1/(3-3)=", None),
        ("3 4+5=", None),
        ("(3+4=", None),
        ("3+4)=", None),
        ("()+1=", None),
        ("3+=", None),
        ("2**3=", None),
        ("6//2=", None),
        ("x3+4=", None),
        ("1.5+2=", None),
        ("1,000+2=", None),
        ("2^3+4=", None),
        ("2 ^ 3+4=", None),
        ("5%3+4=", None),
        ("3!-1+2=", None),
        ("٣+4=", None),
        ("é3+4=", None),
        ("1+" * 49 + "1=", "50"),
        ("1+" * 50 + "1=", None),  # too long
        ("1" * 5000 + "+1=", None),
        ("9" * 18 + "+1=", "1" + "0" * 18),
        ("9" * 18 + "*9=", None),  # too large
        ("9" * 18 + "*9-" + "9" * 18 + "*9=", None),  # on the way, too
        ("(" * 20 + "1+1" + ")" * 20 + "=", "2"),
        ("(" * 21 + "1+1" + ")" * 21 + "=", None),  # too deep
        ("-" * 60 + "1+1=", None),
        ("(" * 100_000 + "=", None),
    ],
)
def test_the_calculator_answers(so_far, answer):
    assert calculator(so_far) == answer


def test_triggers_and_formats():
    assert Calculator(trigger=" ->")("3+4 ->") == "7"
    assert Calculator(format="{}>>")("<<3+4=") == "7>>"
    assert Calculator(max_length=3)("1+2=") == "3" and Calculator(max_length=3)("11+2=") is None


def expressions() -> st.SearchStrategy[tuple[str, Fraction | None, bool]]:
    """Expressions, in full parentheses or few; their values by Python's fractions, None for a division by zero; and
    whether they have an operator of two operands."""
    ways = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    rank = {"+": 1, "-": 1, "*": 2, "/": 2}

    def combine(children):
        def joined(left, op, right, space, parentheses):
            (a, x, i, _), (b, y, j, _) = left, right
            a = f"({a})" if parentheses or i < rank[op] else a
            b = f"({b})" if parentheses or j <= rank[op] else b
            zero = x is None or y is None or (op == "/" and y == 0)
            return f"{a}{space}{op}{space}{b}", None if zero else ways[op](x, y), rank[op], True

        def negated(child):
            a, x, i, binary = child
            return f"-({a})" if i < 3 else f"-{a}", None if x is None else -x, 3, binary

        return st.builds(
            joined, children, st.sampled_from("+-*/"), children, st.sampled_from(["", " "]), st.booleans()
        ) | st.builds(negated, children)

    leaf = st.integers(0, 99).map(lambda n: (str(n), Fraction(n), 3, False))
    return st.recursive(leaf, combine, max_leaves=6).map(lambda t: (t[0], t[1], t[3]))


@settings(max_examples=300)
@given(expressions())
def test_values_are_pythons(case):
    expression, value, binary = case
    assume(len(expression) <= 100 and expression.count("(") + expression.count("-") <= MAX_DEPTH)
    assert evaluate(expression) == value
    written = value is not None and value.denominator == 1 and binary
    assert calculator(f"{expression}=") == (str(value) if written else None)


@settings(max_examples=300)
@given(st.text("0123456789+-*/() =.a", max_size=300))
def test_no_text_makes_it_fail(s):
    answer = calculator(s + "=")
    assert answer is None or answer.strip().lstrip("-").isdigit()
    evaluate(s)


# -- tokenizers ------------------------------------------------------------------------------------------------------


def inserted(tokenizer: PreTrainedTokenizerFast, so_far: str) -> tuple[list[int], str]:
    """What the calculator inserts after a text, as tokens, and the text with it."""
    vocabulary = Vocabulary(tokenizer, None, len(tokenizer))
    prefix = vocabulary.encode([so_far])[0]
    watch = Insertions(SimpleNamespace(vocabulary=vocabulary), [calculator], torch.tensor([], dtype=torch.long))
    found: list[int] = []
    while (token := int(watch(torch.tensor([[*prefix, *found]]))[0, -1])) != PAD:
        found.append(token)
    return found, vocabulary.decode([*prefix, *found])


def words(*vocabulary: str, pre, decoder) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}))
    backend.pre_tokenizer = pre
    if decoder is not None:
        backend.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=vocabulary[0], clean_up_tokenization_spaces=False
    )


def test_a_tokenizer_that_puts_spaces_before_what_it_encodes():
    """As Llama's: "7" by itself would be " 7", so that it is encoded after the text."""
    pieces = ["<eos>", "▁", *"0123456789+=", "▁7", "▁3"]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "7"), ("▁", "3")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert tokenizer("7", add_special_tokens=False)["input_ids"] == [pieces.index("▁7")]
    assert inserted(tokenizer, "3+4=") == ([pieces.index("7")], "3+4=7")


def test_a_tokenizer_whose_decoder_puts_spaces_between_words():
    tokenizer = words("<eos>", "3", "4", "7", "+", "=", pre=pre_tokenizers.Whitespace(), decoder=None)
    assert inserted(tokenizer, "3+4=") == ([3], "3 + 4 = 7")


def test_what_the_tokenizer_cannot_write_is_not_inserted():
    tokenizer = words("<eos>", "3", "4", "+", "=", pre=pre_tokenizers.Split("", "isolated"), decoder=decoders.Fuse())
    assert inserted(tokenizer, "3+4=") == ([], "3+4=")


@pytest.mark.skipif(not GPT2.is_dir(), reason=f"no tokenizer in {GPT2}")
@pytest.mark.parametrize(
    ("so_far", "whole"),
    [("6 - 0 =, 6 - 4 =", "6 - 0 =, 6 - 4 = 2"), ("4 - 9 =", "4 - 9 = -5"), ("1234*5678=", "1234*5678=7006652")],
)
def test_gpt2s_tokenizer(so_far, whole):
    tokenizer = AutoTokenizer.from_pretrained(GPT2)
    found, spelled = inserted(tokenizer, so_far)
    assert spelled == whole
    assert found == tokenizer(whole[len(so_far) :])["input_ids"]
