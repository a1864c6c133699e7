"""Chat: texts as turns of a tokenizer's own template, in prompts, in models and in guides."""

from __future__ import annotations

import math
from itertools import product

import peft
import pyro
import pytest
import torch
from reference import Law, Plain, tokens
from tiny import flat_lm, tiny_tokenizer

from lmppl import LanguageModel, text
from lmppl.distributions import Completion
from lmppl.inference import SMC, AutoGuide, Enumeration
from lmppl.inference.core import programs
from lmppl.text import PAD

# One token a character: "<eos>" ends each turn, "u" and "v" open those of the user and of the model.
TEMPLATE = (
    "{% for m in messages %}{{ 'u' if m['role'] == 'user' else 'v' }}{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}v{% endif %}"
)
REFUSES = "{{ raise_exception('only users are heard') if messages[0]['role'] != 'user' }}" + TEMPLATE
CONFIG = peft.LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """26 tokens, of which the model can write few: the others have no part in what is tested."""
    lm = flat_lm(vocab=26, dtype=torch.float64)
    lm.tokenizer.chat_template = TEMPLATE
    return lm


def user(content) -> dict:
    return {"role": "user", "content": content}


def model_(content) -> dict:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("open_turn", [True, False])
def test_strings_are_as_the_tokenizer_has_them(lm, open_turn):
    messages = [user("ab"), model_("c."), user("")]
    own = lm.tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=open_turn, return_dict=False)
    assert lm.chat(messages, add_generation_prompt=open_turn).tolist() == own


def test_texts_are_where_strings_would_be_batched_and_broadcasting(lm):
    x, z = ["ab", ""], ["c", "aa", "."]
    found = lm.chat([user(lm.encode(x)[:, None]), model_(lm.encode(z, stop="eos")), user("b")])
    assert found.shape[:-1] == (2, 3)
    for (i, xi), (j, zj) in product(enumerate(x), enumerate(z)):
        whole = lm.chat([user(xi), model_(zj), user("b")])
        assert text.equal(found[i, j], whole), (xi, zj)


def test_turn_ends_inside_a_text_stay_and_the_last_is_the_templates(lm):
    turns = lm.encode("a<eos>vb", stop="eos")
    found = lm.chat([user(turns)])
    assert tokens(found) == tokens(lm.encode("ua<eos>vb<eos>v"))
    assert tokens(lm.join(found, turns, "c")) == tokens(lm.encode("ua<eos>vb<eos>va<eos>vbc"))
    assert tokens(lm.fill("{x}{y}", x=found, y=turns)) == tokens(lm.encode("ua<eos>vb<eos>va<eos>vb"))


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (None, [user("a")], "no chat template"),
        (REFUSES, [model_("a")], "messages: .*only users are heard"),
        (TEMPLATE, user("a"), "messages: expected a list"),
        (TEMPLATE, [{"role": "user"}], "messages: expected a list"),
        (TEMPLATE, [user(["a", "b"])], "messages: expected a list"),
        ("{{ messages[0]['content'] }}", [user("a"), user(torch.tensor([3]))], "writes the texts of messages"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", [user(torch.tensor([3]))], "writes the"),
        ("{{ 1 / 0 }}", [user("a")], "messages: .*division by zero"),
        (TEMPLATE, [user(torch.tensor(3))], "content must be texts or strings"),
        ("{{ messages[0]['content'] | upper }}", [user(torch.tensor([3]))], "writes the texts of messages"),
        ("{{ messages[0]['content'] | lower }}", [user(torch.tensor([3]))], "writes the texts of messages"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(lm, template, messages, reason):
    refusing = LanguageModel(lm.model, tiny_tokenizer(26))
    refusing.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=reason) as error:
        refusing.chat(messages)
    assert "\n" not in str(error.value)


def test_a_template_may_be_an_argument_and_arguments_about_tokens_are_refused(lm):
    plain = LanguageModel(lm.model, tiny_tokenizer(26))
    plain.tokenizer.chat_template = None
    messages = [user("ab"), model_("c")]
    assert tokens(plain.chat(messages, chat_template=TEMPLATE)) == tokens(lm.chat(messages, chat_template=TEMPLATE))
    for name, value in {"truncation": True, "max_length": 2, "padding": True, "tokenize": False}.items():
        with pytest.raises(ValueError, match=f"{name}: .*leave this argument out"):
            lm.chat(messages, **{name: value})


def reasoning(lm: LanguageModel):
    """A question is asked, a reason is thought of, the answer follows in a turn of its own."""

    def model(x, y):
        with pyro.plate("questions", len(x)):
            z = pyro.sample("z", Completion(lm, lm.chat([user(x)]), max_tokens=1, allowed=[0, 2, 3]))
            answer = lm.chat([user(x), model_(z), user("b")])
            pyro.sample("y", Completion(lm, answer, max_tokens=2), obs=y)

    return model


def test_evidence_of_a_conversation_whose_middle_turn_is_latent(lm):
    x, y = lm.encode(["ab", "c"]), lm.encode([".", "aa"], stop="eos")
    found = Enumeration(reasoning(lm)).run(x, y)
    plain = Plain(lm)
    for i in range(2):
        xi, yi = tokens(x[i]), tokens(y[i])
        b, u, v, eos = (lm.token_id(c) for c in ("b", "u", "v", "eos"))
        asked = (u, *xi, eos, v)
        total = 0.0
        for z in ((), (2,), (3,)):
            log_p = Law(plain, asked, 1, stops=(eos,), allowed=lambda prefix: {0, 2, 3}).log_prob((*z, eos))
            log_p += Law(plain, (*asked, *z, eos, u, b, eos, v), 2, stops=(eos,)).log_prob(yi)
            total += math.exp(log_p)
        assert float(found.log_evidence[i]) == pytest.approx(math.log(total), abs=1e-9)


def test_smc_over_turns_agrees_with_enumeration(lm):
    x, y = lm.encode(["ab"]), lm.encode(["."], stop="eos")
    exact = Enumeration(reasoning(lm)).run(x, y).log_evidence
    pyro.set_rng_seed(1)
    runs = torch.stack([SMC(reasoning(lm), num_particles=64).run(x, y).log_evidence for _ in range(60)]).exp()
    error = runs.std() / math.sqrt(len(runs))
    assert abs(float(runs.mean() - exact.exp())) < 5 * float(error)


def prompt_of(guide, lm, *args):
    return programs.trace(guide, args, {}, nesting=1, particles=2).nodes["z"]["fn"].prompt


def test_an_automatic_guide_keeps_turn_ends_and_can_chat(lm):
    x, y = lm.encode(["ab"]), lm.encode(["."], stop="eos")
    plain = AutoGuide(reasoning(lm), CONFIG, separator=".", args=(x, y))
    assert tokens(prompt_of(plain, lm, x, y)[0]) == tokens(lm.encode("..uab<eos>v"))
    chat = AutoGuide(reasoning(lm), plain.lm("z"), [user("a{y}b{x}"), model_("c"), user("a")], args=(x, y))
    assert tokens(prompt_of(chat, lm, x, y)[0]) == tokens(lm.encode("ua.bab<eos>vc<eos>ua<eos>v"))


def test_a_prompts_bos_is_dropped_where_the_guide_puts_something_before():
    lm = flat_lm(vocab=8, add_bos=True, pad_is_eos=True)
    bos = torch.tensor([[lm.bos_id]])

    def model(x, y):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", Completion(lm, text.cat(bos, x), max_tokens=1))
            pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=1), obs=y)

    x, y = lm.encode(["a"]), lm.encode(["b"], stop="eos")
    found = prompt_of(AutoGuide(model, CONFIG, separator=".", args=(x, y)), lm, x, y)
    assert tokens(found[0]) == tokens(lm.encode("b.a")) and PAD not in found
