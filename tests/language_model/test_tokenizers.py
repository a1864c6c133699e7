"""One contract for every tokenizer: a text is what its tokens spell, wherever they stand."""

from __future__ import annotations

import re

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import GPT2, tiny_lm, tiny_tokenizer
from tokenizer_cases import EXTRA, FAMILIES, Family, model_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lmppl import LanguageModel, text
from lmppl.constraints import regex
from lmppl.constraints.masks import keeps
from lmppl.distributions import Completion
from lmppl.distributions.insertions import Insertions
from lmppl.inference import Importance
from lmppl.text import PAD
from lmppl.tools import Calculator

WORDS = [
    "Tom",
    " went",
    "the",
    " kitchen",
    ".",
    ",",
    " ",
    "  ",
    "\n",
    "\n\n",
    "é",
    "né",
    "我们",
    "🙂",
    "6",
    " =",
    "(",
    "'t",
]
few = settings(max_examples=15)


def of(family: Family, **kwargs: int) -> st.SearchStrategy[str]:
    """Strings that a family can write: words, and any characters, "▁" left out, which some read as a space."""
    words = [w for w in WORDS if re.fullmatch(f"(?:{family.characters})*", w)]
    any_character = st.characters(exclude_categories=["Cs"], exclude_characters="▁\x00")
    character = any_character.filter(lambda c: re.fullmatch(family.characters, c) is not None)
    if "-" in family.characters:  # a few: drawn, not searched for
        character = st.sampled_from([c for c in map(chr, [10, *range(32, 127)]) if re.fullmatch(family.characters, c)])
    return st.lists(st.one_of(st.sampled_from(words), character), **{"max_size": 8} | kwargs).map("".join)


@pytest.fixture(params=[*FAMILIES, *(f"{name} + added" for name in FAMILIES)])
def case(request) -> tuple[Family, LanguageModel]:
    """A family, and a model whose vocabulary is padded beyond its tokenizer's."""
    name = request.param.removesuffix(" + added")
    if name == "gpt-2" and not GPT2.is_dir():
        pytest.skip(f"no tokenizer in {GPT2}")
    return FAMILIES[name], model_of(name, request.param != name)


# Strings --------------------------------------------------------------------------------------------------------------


def test_what_is_encoded_is_decoded(case):
    family, lm = case

    @few
    @given(st.lists(of(family), max_size=4))
    def holds(strings):
        found = lm.decode(lm.encode(strings))
        assert [family.seen(s) for s in found] == [family.seen(s) for s in strings]
        assert [family.seen(s) for s in lm.decode(lm.encode(found))] == [family.seen(s) for s in strings]
        assert [lm.decode(lm.encode(s)) for s in strings] == found

    holds()
    if family.spaces:
        odd = ["", " ", "   ", " tom", "  tom", "tom ", "\n", "\ntom", " \n "]
        assert lm.decode(lm.encode(odd)) == odd


def test_a_document_is_what_the_tokenizer_writes(case):
    family, lm = case

    @few
    @given(of(family))
    def holds(string):
        plain = lm.tokenizer(string, add_special_tokens=False)["input_ids"]
        assert lm.encode(string, start=True).tolist() == plain
        if not lm.vocabulary.marks_start and family.spaces:
            assert lm.encode(string).tolist() == plain
        assert Completion(lm, string, max_tokens=1).prompt.tolist() == plain

    holds()


def test_fill_is_string_formatting(case):
    family, lm = case

    @few
    @given(of(family), of(family), of(family), st.lists(of(family), min_size=1, max_size=3), of(family))
    def holds(before, between, after, xs, y):
        template = "{x}".join(s.replace("{", "{{").replace("}", "}}") for s in (before, between)) + "{y}"
        template += after.replace("{", "{{").replace("}", "}}")
        expected = [family.seen(template.format(x=x, y=y)) for x in xs]
        x = lm.encode(xs, stop="eos" if lm.vocabulary.eos_ids else None)
        assert [family.seen(s) for s in lm.decode(lm.fill(template, x=x, y=y))] == expected
        assert [family.seen(s) for s in lm.decode(lm.fill(template, x=x, y=lm.encode(y)))] == expected
        assert torch.equal(lm.fill(template, x=xs[0], y=y), lm.encode(template.format(x=xs[0], y=y)))

    holds()
    assert family.seen(lm.decode(lm.join("tom", "my"))) == family.seen("tommy")
    assert family.seen(lm.decode(lm.join(lm.encode("tom"), "my"))) == family.seen("tommy")


def test_decoded_pieces_are_the_decoded_whole(case):
    """However a text is cut; where a character is cut, U+FFFD stands for it and for nothing else."""
    family, lm = case

    @few
    @given(of(family), st.data())
    def holds(string, data):
        z = lm.encode(string)
        spelled = [lm.vocabulary.spelled[i] for i in z.tolist()]
        whole = lm.decode(z)
        assert whole.encode() == b"".join(spelled)
        at = data.draw(st.integers(0, len(z)))
        first, second = lm.decode(z[:at]), lm.decode(z[at:])
        before = b"".join(spelled[:at]).decode(errors="ignore")
        after = b"".join(spelled[at:]).decode(errors="ignore")
        assert first.startswith(before) and set(first[len(before) :]) <= {"\ufffd"}
        assert second.endswith(after) and set(second[: len(second) - len(after)]) <= {"\ufffd"}
        assert whole.startswith(before) and whole.endswith(after) and len(whole) - len(before + after) <= 1
        assert lm.decode(lm.join(z[:at], z[at:])) == whole

    holds()


def test_everything_sees_the_decoded_string(case):
    """Its first space included: `decode`, `text.map` and a posterior's table."""
    family, lm = case
    seen: list[str] = []

    def model():
        z = pyro.sample("z", Completion(lm, lm.encode("the"), max_tokens=3, stop=None))
        pyro.factor("seen", text.map(lambda s: seen.append(s) or 0.0, z, lm))

    posterior = Importance(model, num_particles=20).run()
    drawn = lm.decode(posterior.samples["z"])
    assert {s for s, _ in posterior.table("z")} == set(drawn) and set(drawn) <= set(seen)
    if lm.vocabulary.one_token(" the") is not None:
        assert lm.decode(lm.encode(" the")) == " the"


# Constraints and tools ------------------------------------------------------------------------------------------------


def test_a_constraint_accepts_what_its_pattern_matches_in_the_decoded_text(case):
    """And its masks lead, token by token, to these texts and to no other."""
    family, lm = case
    stop = lm.vocabulary.token_id(0)
    pattern = r"(?s:[ T].*e.*|tom|[^a-z]+|.*né.*)"
    allowed = regex(lm, pattern, stop=stop)

    def accepted(rows):
        for z in rows:
            matches = re.fullmatch(pattern, lm.decode(z)) is not None and "\ufffd" not in lm.decode(z)
            assert allowed.accepts(z).item() == matches, lm.decode(z)
            ended = torch.cat([z, torch.tensor([stop])])
            assert keeps(allowed, ended, lm.vocab_size).item() == matches, lm.decode(z)

    @few
    @given(st.lists(of(family, max_size=5), min_size=1, max_size=2), st.randoms(use_true_random=False))
    def holds(strings, random):
        known = [i for i, s in enumerate(lm.vocabulary.spelled) if s]
        accepted([*(lm.encode(s) for s in strings), torch.tensor(random.choices(known, k=3))])

    if lm.vocabulary.spelled[stop]:  # no silent token in this vocabulary to stop by
        stop = lm.vocabulary.eos_id
        allowed = regex(lm, pattern, stop=stop)
    accepted(lm.encode(s) for s in (" the", "tom", " T e", " 6"))
    holds()


def test_a_tool_writes_its_answer_in_context(case):
    family, lm = case
    watch = Insertions(lm, [Calculator()], torch.tensor([], dtype=torch.long))
    for string in ("6-4=", " 6 - 4 =", "3*(2+5)=", " 4 - 9 ="):
        z = lm.encode(string)
        so_far, answer = lm.decode(z), Calculator()(lm.decode(z))
        found = z.tolist()
        while (token := int(watch(torch.tensor([found]))[0, -1])) != PAD:
            found.append(token)
        if answer is not None:  # where spaces are lost, the trigger may not be the last character
            assert family.seen(lm.decode(torch.tensor(found))) == family.seen(so_far + answer)
            assert not family.spaces or lm.decode(torch.tensor(found)) == string + answer


@pytest.mark.parametrize("stop", [".", "\n", " the"])
def test_a_stop_is_whatever_token_spells_it(case, stop):
    family, lm = case
    if stop.encode() in lm.vocabulary.spelled:
        assert lm.decode(lm.stop_ids(stop)) == stop
    else:
        with pytest.raises(ValueError, match=r"stop=.* is (written|nothing)"):
            lm.stop_ids(stop)


# What cannot be written -----------------------------------------------------------------------------------------------


def test_what_a_tokenizer_loses_is_refused(case):
    """By the text, the word and the character: a character that is dropped, or unknown, is a silently wrong number."""
    family, lm = case
    lost = "ß"
    if re.fullmatch(family.characters, lost):
        assert lm.decode(lm.encode(lost)) == lost
        return
    for texts in (["Tom", f"the cat {lost}", "a"], [f"the x{lost}y"], [lost]):
        bad = next(t for t in texts if lost in t)
        for start in (False, True):
            with pytest.raises(ValueError, match=re.escape(repr(bad))) as caught:
                lm.encode(texts, start=start)
            assert lost in str(caught.value) and "cannot be encoded" in str(caught.value)
    assert lm.decode(lm.encode("the")).strip() == "the"


def test_a_tokenizer_without_unknowns_loses_nothing_either():
    """Byte-pair encoding without bytes drops what it does not know, newlines among them."""
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abc ")}, merges=[]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert tokenizer("a\nb")["input_ids"] == [0, 1]
    lm = LanguageModel(tiny_lm(vocab=8).model, tokenizer)
    assert lm.decode(lm.encode("ab c")) == "ab c"
    for lost, named in (("a\nb", "'\\n' in"), ("\n", "'\\n' cannot"), ("ab abd a", "'d' in ' abd'")):
        with pytest.raises(ValueError, match=re.escape(named)):
            lm.encode(["abc", lost])


@pytest.mark.parametrize("single", ["$A </s>", "</s> $A", "</s> $A </s>", "$A"])
@pytest.mark.parametrize("words", [["a", "."], ["zoo"]])
def test_a_bos_is_put_first_where_the_tokenizer_does_so_and_not_where_it_is_the_end(single, words):
    """One token is bos and eos, and may be written after a text; a vocabulary may lack all common characters."""
    ids = {word: i for i, word in enumerate(["</s>", *words])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="</s>") if "." in words else models.WordLevel(ids))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="</s>", eos_token="</s>")
    assert LanguageModel(tiny_lm(vocab=8).model, tokenizer).adds_bos == single.startswith("</s>")


def test_a_bos_that_the_network_does_not_know_is_not_read():
    """A tokenizer with tokens added, and a network that was not resized."""
    network = tiny_lm(vocab=8, dtype=torch.float32).model
    added = tiny_tokenizer(8)
    added.add_special_tokens({"bos_token": "<begin>", "eos_token": "<end>"})
    network.generation_config.eos_token_id = network.config.eos_token_id = None
    network.generation_config.bos_token_id = network.config.bos_token_id = None
    lm = LanguageModel(network, added)
    assert lm.bos_id is None
    for use in (lambda: lm.encode("a", stop="eos"), lambda: lm.stop_ids("eos"), lambda: lm.eos_ids):
        with pytest.raises(ValueError, match="stop='eos' is the id 9, .* model's 8 ids"):
            use()
    with pytest.raises(ValueError, match="prompt: an empty prompt"):
        Completion(lm, "", max_tokens=2, stop=".").sample()
    backend = added.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 8)])
    with pytest.raises(ValueError, match="tokenizer: .*'<begin>', the id 8, .*8 ids; call model.resize_token_emb"):
        LanguageModel(network, added)


def test_special_tokens_in_strings_are_themselves(case):
    family, lm = case
    added = {str(t): i for i, t in lm.tokenizer.added_tokens_decoder.items()}
    if "<tool>" not in added:
        return
    found = lm.encode("the<|end|>\n<|user|>the<tool>the <left>the")
    inside = [i for i in found.tolist() if i in added.values()]
    assert inside == [added[str(t)] for t in (EXTRA[0], EXTRA[1], EXTRA[2], EXTRA[3])]
    assert "".join(lm.decode(found).split()) == "thethe<tool>the<left>the"  # as what is special says nothing
    assert lm.stop_ids(["<|end|>", "<tool>"]).tolist() == [added["<|end|>"], added["<tool>"]]
