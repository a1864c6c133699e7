"""Sentences that the corpus cannot have, and the study of uncertainty."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.paper.subjectivity import Setup
from benchmarks.uncertainty import page
from benchmarks.uncertainty.measured import CELLS, Sentences, few, first, parts, run, scores
from lmppl import LanguageModel, embedded
from lmppl.embedded.subjectivity import IDLE, KINDS, REASONS, SIZES, STRANGE, possible, strange
from lmppl.inference import Ensemble, Prediction
from lmppl.models import Subjectivity
from lmppl.models.programs.subjectivity import allowed_words
from worlds import subjectivity

# As they were before any method read them.
FROZEN = {
    "three kinds": ("The youthful tale about kisses and puns", "60045c2815a7c3dd"),
    "word order": ("The tears longings story and about tender", "2f1d744b1b80cbb1"),
    "idle words": ("The title film about poster and budget", "b799101463b9b0c1"),
}


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def test_strange_sentences_are_those_that_were_frozen():
    assert {rule: (strange(rule)[0], digest(strange(rule))) for rule in STRANGE} == FROZEN
    with pytest.raises(ValueError, match="rule='odd'"):
        strange("odd")


def test_strange_sentences_are_impossible_and_told_in_known_words():
    """And what the corpus has is possible: all of 1,600 sentences."""
    texts = [s.text for split in SIZES for s in embedded.data("subjectivity", split)]
    assert all(map(possible, texts)) and len(texts) == sum(SIZES.values())
    lm = LanguageModel.embedded("subjectivity")
    kind_of = {word: kind for kind, parts in KINDS.items() for part in parts for word in part}
    for rule in STRANGE:
        found = strange(rule)
        assert len(set(found)) == 200 and not any(map(possible, found)) and not {*found} & {*texts}
        assert lm.decode(lm.encode(found)) == found
    for text in strange("three kinds"):
        assert len({kind_of[w] for w in text.split() if w in kind_of}) == 3
    for text in strange("idle words"):
        assert len({f" {w}" for w in text.split()} & {*IDLE}) == 3
    for text in strange("word order"):
        the, *rest = text.split()
        assert the == "The" and {"about", "and"} < {*rest} and len(rest) == 6


@pytest.mark.parametrize(
    "text",
    [
        "The winding film about kidnappings",  # too short
        "A winding film about kidnappings and betrayals",
        "The winding film of kidnappings and betrayals",
        "The winding movie about kidnappings and betrayals",
        "The kidnappings film about winding and betrayals",  # an adjective in a noun's place
        "The winding film about brothers and villages",  # three kinds
        "The winding film about posters and brothers",
    ],
)
def test_what_is_not_possible(text):
    assert possible("The winding film about kidnappings and brothers") and not possible(text)


# -- the decomposition on the embedded language model ------------------------------------------------------------------


def entropy(p: torch.Tensor) -> float:
    return -sum(q * math.log(q) for q in p.tolist() if q > 0)


def test_the_split_is_that_of_a_loop_over_all_chains_by_plain_passes():
    """Two members, which reason in kinds and in idle words: 156 chains each, one after another."""
    lm, weights = LanguageModel.embedded("subjectivity", dtype=torch.float64), torch.tensor([1.0, 3.0])
    path = embedded.path("subjectivity")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval().double(), AutoTokenizer.from_pretrained(path)
    texts = [strange("three kinds")[0], embedded.data("subjectivity", "test")[0].text]
    members = [
        Subjectivity(lm, allowed=allowed_words(lm, words), max_tokens=2).predict(lm.encode(texts))
        for words in (REASONS, IDLE)
    ]
    found = Ensemble.of(members, weights).split()
    for i, x in enumerate(texts):
        averages, expected = [], []
        for words in (REASONS, IDLE):
            log_prior, log_label = subjectivity.log_joint(model, tokenizer, x, words)
            average, inner = torch.zeros(2, dtype=torch.float64), 0.0
            for p_z, p_y in zip(log_prior.exp().tolist(), log_label.exp(), strict=True):
                average, inner = average + p_z * p_y, inner + p_z * entropy(p_y)
            averages.append(average)
            expected.append(inner)
        total = entropy((averages[0] + 3 * averages[1]) / 4)
        by_member = (entropy(averages[0]) + 3 * entropy(averages[1])) / 4
        inner = (expected[0] + 3 * expected[1]) / 4
        by_hand = total, inner, by_member - inner, total - by_member
        assert [float(t[i]) for t in found] == pytest.approx(by_hand, abs=1e-9)
        assert found.chain_information[i] > 0.01 and found.parameter_information[i] > 1e-4


# -- the study ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences():
    return Sentences(Setup(100, 10, 0, short=True), short=True)


def said(sentences: Sentences, members: int = 3, chains: int = 40) -> list[Prediction]:
    """Random answers about these sentences, a chain's after another's."""
    g, shape = torch.Generator().manual_seed(0), (2, chains, len(sentences.x))
    equal = torch.full(shape[1:], 1 / chains).log()
    return [
        Prediction(
            ["a", "b"], (torch.randn(shape, generator=g) + j * torch.randn(shape[2], generator=g)).log_softmax(0), equal
        )
        for j in range(members)
    ]


def test_scores_are_those_of_the_sentences_that_they_are_compared_on(sentences):
    """A score that marks a group finds it, and no other; one that marks the errors finds them alone."""
    assert sentences.groups == {
        "test": slice(0, 32), "three kinds": slice(32, 40), "word order": slice(40, 48), "idle words": slice(48, 56)
    }  # fmt: skip
    known = {t.kind for t in Setup(100, 10, 0, short=True).sentences}
    kinds = [t.kind not in known for t in embedded.data("subjectivity", "test")[:32]]
    assert sentences.unlearnt.tolist() == kinds and 0 < sum(kinds) < 32
    right = (torch.arange(32) % 3 > 0).double()
    marks = torch.zeros(56)
    marks[40:48] = 1
    found = sentences.finds(marks, right)
    assert (found["word order"], found["three kinds"], found["errors"], found["unlearnt"]) == (1.0, 0.5, 0.5, 0.5)
    assert found["impossible"] == pytest.approx(2 / 3)
    found = sentences.finds(torch.cat([1 - right, torch.zeros(24)]), right)
    assert found["errors"] == 1.0 and found["half"] == 1.0 and found["idle words"] < 0.5
    found = sentences.finds(torch.cat([sentences.unlearnt.double(), torch.ones(24)]), right)
    assert found["unlearnt"] == 1.0 and found["unlearnt"] > found["errors"]


def test_the_scores_of_an_ensemble(sentences):
    """With two labels entropy and 1 - max p put sentences in one order; the parts add up in every group."""
    whole = Ensemble.of(said(sentences))
    found = scores(whole)
    order = found["1 - max p"].argsort()
    assert bool((found["entropy"][order].diff() > -1e-9).all())
    assert bool((found["disagreement of votes"] <= 0.5).all())
    unanimous = Prediction(["a", "b"], torch.tensor([0.9, 0.1]).log()[:, None, None].expand(2, 4, 1), torch.zeros(4, 1))
    assert float(scores(Ensemble.of([unanimous]))["disagreement of votes"]) == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(
        found["entropy"],
        found["expected entropy"] + found["chain information"] + found["parameter information"],
    )
    right = (torch.arange(32) % 2).double()
    for name, own in parts(whole, sentences, right).items():
        rows = {"right": range(1, 32, 2), "wrong": range(0, 32, 2), "three kinds": range(32, 40)}.get(name)
        if rows is not None:
            assert sum(own.values()) == pytest.approx(float(whole.entropy[list(rows)].mean()), abs=1e-5)


def test_few_chains_are_the_first_ones(sentences):
    drawn = said(sentences)
    found = few(Ensemble.of(drawn), drawn, sentences)
    by_hand = Ensemble.of([first(p, 8, 32) for p in drawn])
    for how in ("split", "jackknife"):
        u = getattr(by_hand, how)()
        assert found[f"{how} chain_information 8"]["mean"] == pytest.approx(float(u.chain_information.mean()))
    assert by_hand.log_probs.shape == (2, 24, 32)
    torch.testing.assert_close(by_hand.members[1].log_probs, drawn[1].log_probs[:, :8, :32])
    assert found["split chain_information 32"]["error"] < found["split chain_information 2"]["error"]
    assert found["exact"]["parameter_information"] == pytest.approx(
        float(Ensemble.of(drawn).split().parameter_information[:32].mean())
    )


def test_calibration_by_chance_is_that_of_answers_drawn_from_the_forecast(sentences):
    coin = torch.full((2, 32), 0.5)
    assert sentences.ideal(coin) == pytest.approx(0.0, abs=1e-6)  # a tie is half right, whatever comes
    assert sentences.ideal(torch.tensor([[1.0], [0.0]]).expand(2, 32)) == 0.0
    p = torch.tensor([[0.8], [0.2]]).expand(2, 32)
    error = (0.8 * 0.2 / 32) ** 0.5  # of a share; its mean size is 0.8 of it
    assert sentences.ideal(p) == pytest.approx(0.8 * error, rel=5 * 0.75 / 20**0.5)


@pytest.mark.slow
def test_a_short_study(tmp_path):
    results = {cell: [run(cell, 100, short=True)] for cell in CELLS}
    json.dumps(results, allow_nan=False)
    ten = results["10"][0]
    assert ten["forecasts"]["all chains, one adapter"]["errors"] == ten["one"]["forecast"]["errors"]
    assert ten["one"]["scores"]["parameter information"]["errors"] == pytest.approx(0.5, abs=0.2)  # rounding alone
    assert ten["surprise"]["idle words"] > 0.9
    exact, many = ten["few"]["exact"]["chain_information"], ten["few"]["split chain_information 32"]
    assert many["mean"] == pytest.approx(exact, abs=0.02)
    text = page.report(results)
    assert text.count("- *") == 15 and "five samples of SGLD" in text
    page.plot(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_prompts_as_members_on_a_pretrained_model(smollm2_lm):
    """What the ensemble splits is p(y | x, z) of each chain alone, by a pass of its own."""
    prompts = "Sentence:{x}\nThis sentence is about", "Sentence:{x}\nIt is about"
    x = smollm2_lm.encode([" a moving film.", " two men rob a bank in Boston."])
    tasks = [
        Subjectivity(smollm2_lm, labels=("plot", "review"), why=why, then=" so it is from a movie") for why in prompts
    ]
    with torch.no_grad():
        chains = [task.prior(x).sample(torch.Size([3])) for task in tasks]
        members = [
            Prediction(list(task.labels), task.log_labels(x, z).movedim(-1, 0), torch.full((3, 2), 1 / 3).log())
            for task, z in zip(tasks, chains, strict=True)
        ]
        found = Ensemble.of(members).split()
        for i in range(2):
            alone = [
                torch.cat([task.log_labels(x[i : i + 1], z[n, i : i + 1]) for n in range(3)]).double().exp()
                for task, z in zip(tasks, chains, strict=True)
            ]  # (3, 2) each
            total = entropy(torch.cat(alone).mean(0))
            inner = sum(entropy(p) for p in torch.cat(alone)) / 6
            between = sum(entropy(p.mean(0)) for p in alone) / 2
            by_hand = total, inner, between - inner, total - between
            assert [float(t[i]) for t in found] == pytest.approx(by_hand, abs=1e-4)
            assert total > 0.05
