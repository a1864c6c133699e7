"""The embedded story LM: its world, its corpus, its tokenizer, and what the shipped weights must show."""

import subprocess
import sys
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmppl import embedded
from lmppl.embedded import stories
from worlds import build
from worlds import stories as corpus
from worlds import story_gates as gates
from worlds.world import Gate, Report


@pytest.fixture(scope="module")
def words():
    return AutoTokenizer.from_pretrained(embedded.path("stories"))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded.path("stories")).eval()


def place_and_verb(story):
    return story.x.removesuffix(".").split()[-1], story.y.split()[1]


def test_no_place_and_verb_is_in_two_splits():
    seen = {split: {place_and_verb(s) for s in embedded.data("stories", split)} for split in stories.SPLITS}
    for split, found in seen.items():
        assert found <= stories.pairs(split)
    assert len(frozenset().union(*map(stories.pairs, stories.SPLITS))) == 8 * 96
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_training_stories_know_every_place_and_verb():
    found = {place_and_verb(s) for s in embedded.data("stories", "train")}
    assert {place for place, _ in found} == set(stories.PLACES)
    assert {verb for _, verb in found} == set(stories.VERBS)


def test_data_is_the_same_on_every_call():
    code = "from lmppl.embedded import data; print([data('stories', s)[-1] for s in ('train', 'validation', 'test')])"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert elsewhere.strip() == str([embedded.data("stories", s)[-1] for s in ("train", "validation", "test")])


def test_the_world_has_the_stated_shape():
    assert len(set(stories.OBJECTS)) == len(set(stories.VERBS)) == 96
    assert {len(offered) for offered in stories.OFFERS.values()} == {48}
    happens = [verb for thing in stories.OBJECTS for verb in set(stories.verbs_of(thing))]
    assert sorted(happens) == sorted(2 * stories.VERBS)  # two per object, two objects each
    story = embedded.data("stories", "test")[0]
    assert len(set(stories.middles(story.x))) == 1152
    assert story.z in stories.middles(story.x)


def test_noise_has_the_stated_rates():
    random, n = Random(0), 20_000
    facts = [stories.draw(random) for _ in range(n)]
    strange_object = sum(f.object not in stories.OFFERS[f.place] for f in facts)
    strange_verb = sum(f.verb not in stories.verbs_of(f.object) for f in facts)
    for count, p in ((strange_object, 0.05), (strange_verb, 0.01 * 94 / 96)):
        assert abs(count - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_no_document_shows_a_later_sentence_before_an_earlier_one():
    random = Random(0)
    for _ in range(5000):
        seen = {}
        for piece in corpus.document(random):
            if piece.part:
                seen.setdefault(piece.story, []).append("xzy".index(piece.part))
        for parts in seen.values():
            assert parts == sorted(set(parts))


def test_documents_vary_in_shape():
    random = Random(0)
    shapes = {"".join(p.part or p.text for p in corpus.document(random)) for _ in range(2000)}
    assert len(shapes) > 500


def test_tokenizer_gives_back_every_document(words):
    random = Random(0)
    for _ in range(500):
        pieces = corpus.document(random)
        text = "".join(piece.text for piece in pieces)
        assert words.decode(words.encode(text)) == text
        for i in range(len(pieces)):  # a fixed string ending in a space is the only place where joints show
            if pieces[i].part and i:
                left, right = "".join(p.text for p in pieces[:i]), "".join(p.text for p in pieces[i:])
                if not left.endswith(" "):
                    assert words.encode(left) + words.encode(right) == words.encode(text)


def test_sentences_concatenate(words):
    for split in stories.SPLITS:
        for s in embedded.data("stories", split)[:50]:
            assert words.encode(s.x) + words.encode(s.z) + words.encode(s.y) == words.encode("".join(s))
            assert words.encode(s.z)[-1:] == words.encode(".")
            assert len(words.encode(s.z)) == 6


def test_a_word_outside_the_vocabulary_is_refused(words):
    with pytest.raises(Exception, match="UNK"):
        words.encode("Tom went to the moon.")


def test_shipped_weights_are_small():
    size = sum(file.stat().st_size for file in embedded.path("stories").parent.rglob("*") if file.is_file())
    assert size < 5e6
    assert sum(file.stat().st_size for file in embedded.path("stories").iterdir()) < 2e6


def test_a_report_passes_where_every_figure_is_within_its_bounds():
    for value, passed in ((0.4, False), (0.5, True), (1.0, True), (1.1, False)):
        report = Report(free=Gate("free", 7.0), bounded=Gate("bounded", value, 0.5, 1.0))
        assert report.passed == passed and str(report).endswith("\npassed" if passed else "\nNOT PASSED")


def test_gates_hold_on_test_stories(model, words):
    assert gates.report(model, words, embedded.data("stories", "test")[:6], draws=2000).passed


@pytest.mark.xfail(strict=True, reason="the shipped LM has not learned the places: about 0.56, see docs/infilling.md")
def test_the_model_knows_what_places_offer(model, words):
    """In the world, the objects that a place does not offer share 5%."""
    report = gates.report(model, words, embedded.data("stories", "test")[:8], draws=100)
    assert 0.90 < report["offered"].value < 0.98


def test_the_model_knows_what_happens_to_objects(model, words):
    """The 94 wrong verbs share a few percent."""
    wrong = []
    for story in embedded.data("stories", "test")[:8]:
        _, verb = place_and_verb(story)
        exact = gates.exact(model, words, story)
        things = [middle.removesuffix(".").split()[-1] for middle in stories.middles(story.x)]
        fits = torch.tensor([verb in stories.verbs_of(thing) for thing in things])
        prior = exact.log_prior.exp()
        assert prior.sum() > 0.985
        assert exact.log_likelihood[fits].exp().min() > 0.3
        wrong.append(exact.log_likelihood[~fits].exp().mean())
    assert 94 * torch.stack(wrong).mean() < 0.04


def test_junk_before_a_story_does_not_change_its_ending(model, words):
    story, junk = embedded.data("stories", "test")[:2]
    plain = gates.exact(model, words, story).log_posterior.exp()
    after = gates.exact(model, words, story._replace(x=f"Note:{junk.y}\n{story.x}")).log_posterior.exp()
    assert 0.5 * (plain - after).abs().sum() < 0.1


def test_the_model_has_not_been_taught_the_answer(model, words):
    """Shown the ending first, it goes on believing what the beginning alone says."""
    for story in embedded.data("stories", "test")[:4]:
        posterior = gates.exact(model, words, story).log_posterior.exp()
        untaught = gates.exact(model, words, story._replace(x=f"Ending:{story.y}\nBeginning:{story.x}\nMiddle:"))
        assert 0.5 * (posterior - untaught.log_prior.exp()).abs().sum() > 0.85


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: embedded.path("poems"), "name='poems'"),
        (lambda: embedded.data("poems", "train"), "name='poems'"),
        (lambda: embedded.data("stories", "dev"), "split='dev'"),
    ],
)
def test_what_does_not_exist_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_build_replaces_nothing_but_a_checkpoint(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit) as stopped:
        build.main(["stories", "--steps", "1", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "out=" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_build_writes_a_checkpoint_that_its_seed_decides(tmp_path):
    torch.manual_seed(1)
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        build.main(["stories", "--seed", str(seed), "--steps", "2", "--check", "0", "--out", str(tmp_path / out)])
        torch.rand(1)  # the caller's random state plays no part
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / out).state_dict() for out in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)
    assert AutoTokenizer.from_pretrained(tmp_path / "a").decode([0]) == "<eos>"
    build.main(["stories", "--seed", "1", "--steps", "1", "--check", "0", "--out", str(tmp_path / "a")])  # replaces
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # nothing half-written is left
