"""Chat templates: what the tokenizer makes of strings, and texts in their place."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import FAMILIES
from tokenizers import AddedToken

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.engine.scoring import with_bos

# Styles, each as its models write it: the template, and its special tokens (the end of a turn first).
STYLES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_end|>", "<|im_start|>"],
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set said = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (said if loop.first else '') + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        [],
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}",
        ["<|eot_id|>", "<|head|>", "<|/head|>"],
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role\nnot supported') }}{% endif %}"
        "{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<end_of_turn>", "<start_of_turn>"],
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
        ["[INST]", "[/INST]"],
    ),
    "phi-3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["<|end|>", "<|user|>", "<|assistant|>"],
    ),
}
TOKENIZERS = ["llama-2", "llama-2, old", "llama-3", "qwen", "gemma", "byte-level"]
WORDS = st.lists(st.sampled_from(["Tom", " the", "é", "\n", "6", "🙂", ".", " went"]), max_size=4).map("".join)
CONTENT = WORDS.map(lambda s: f"a{s}b")  # nothing at its ends for a template to trim


@cache
def chatty(style: str, tokenizer: str) -> LanguageModel:
    """A tiny network and tokenizer in a style, whose turn ends are an eos too."""
    made = FAMILIES[tokenizer].make()
    template, special = STYLES[style]
    made.chat_template = template
    made.add_tokens([AddedToken(s, special=True, rstrip=style == "phi-3", normalized=False) for s in special])
    size = max(made.get_vocab().values()) + 3
    config = hf.LlamaConfig(
        vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    network = hf.LlamaForCausalLM(config)
    network.generation_config.eos_token_id = [made.eos_token_id, *made.convert_tokens_to_ids(special[:1])]
    return LanguageModel(network, made)


CASES = [(s, t) for s in STYLES for t in TOKENIZERS if (s, t) != ("llama-2", "qwen")]  # which has no bos


@pytest.fixture(params=CASES, ids=lambda p: f"{p[0]} on {p[1]}")
def lm(request) -> LanguageModel:
    return chatty(*request.param)


def turns(*contents: str | torch.Tensor) -> list[dict]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]


def of_tokenizer(lm: LanguageModel, messages: list[dict], **kwargs) -> list[int]:
    kwargs = {"add_generation_prompt": True} | kwargs
    return lm.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)


def spaced(lm: LanguageModel, string: str) -> str:
    """A decoded string; without its spaces where the tokenizer writes one after each special token."""
    normalizer = lm.tokenizer.backend_tokenizer.normalizer
    prepends = normalizer is not None and normalizer.normalize_str("a") != "a"
    return string.replace(" ", "") if prepends else string


def test_strings_are_written_as_the_tokenizer_writes_them(lm):
    @settings(max_examples=10)
    @given(st.lists(WORDS, min_size=1, max_size=4))
    def holds(contents):
        messages = turns(*contents)
        assert lm.chat(messages).tolist() == of_tokenizer(lm, messages)
        for prompt in (True, False):
            found = lm.chat(messages, add_generation_prompt=prompt).tolist()
            assert found == of_tokenizer(lm, messages, add_generation_prompt=prompt)

    holds()
    end = lm.tokenizer.convert_ids_to_tokens(lm.vocabulary.eos_ids[-1])
    messages = turns(f"a{end}b TEXT0TEXT TEXT", "TEXT1TEXT", "TEXTX")
    assert lm.chat(messages).tolist() == of_tokenizer(lm, messages)
    opened = turns("Tom?", "He went")
    found = lm.chat(opened, add_generation_prompt=False, continue_final_message=True)
    assert found.tolist() == of_tokenizer(lm, opened, add_generation_prompt=False, continue_final_message=True)


def test_texts_decode_as_strings_do(lm):
    """Batched, with an eos at their ends, which the template's own end replaces."""

    @settings(max_examples=10)
    @given(CONTENT, st.lists(CONTENT, min_size=2, max_size=3), CONTENT, st.booleans())
    def holds(question, answers, again, prompt):
        ended = [lm.encode(answers, stop=e) for e in lm.vocabulary.eos_ids]
        for texts in (lm.encode(answers), *ended):
            found = lm.chat(turns(question, texts, again), add_generation_prompt=prompt)
            expected = [of_tokenizer(lm, turns(question, a, again), add_generation_prompt=prompt) for a in answers]
            strings = [lm.decode(torch.tensor(e)) for e in expected]
            assert [spaced(lm, s) for s in lm.decode(found)] == [spaced(lm, s) for s in strings]
            for row, e in zip(found, expected, strict=True):
                special = lm.vocabulary.special
                assert [i for i in row.tolist() if i in special] == [i for i in e if i in special]
        both = lm.chat(turns(lm.encode(question), lm.encode(answers)[:, None], "TEXT0TEXT"))
        assert both.shape[:2] == (len(answers), 1)

    holds()
    latent = turns("Tom?", lm.encode(["He went", "the"]))
    found = lm.decode(lm.chat(latent, add_generation_prompt=False, continue_final_message=True))
    assert [s[-len(a) :] for s, a in zip(found, ("He went", "the"), strict=True)] == ["He went", "the"]


def test_a_completion_reads_one_bos_at_its_start(lm):
    """Put there by the template, or else by the tokenizer; those inside, before later turns, stay."""
    prompt = lm.chat(turns("Tom?", "He went.", "the"))
    read = with_bos(lm, prompt[None])[0].tolist()
    bos = lm.tokenizer.bos_token_id
    assert read[-len(prompt) :] == prompt.tolist()
    if lm.adds_bos or bos in prompt.tolist()[:1]:
        assert read[0] == bos and read[1] != bos
    if "bos_token + '[INST]" in lm.tokenizer.chat_template and bos != lm.tokenizer.eos_token_id:
        assert read.count(bos) == 2
    assert torch.equal(Completion(lm, prompt, max_tokens=2).prompt, prompt)


@pytest.mark.parametrize(("style", "reason"), [("gemma", "System role not supported"), ("mistral", "must alternate")])
def test_what_a_template_refuses_is_one_line(style, reason):
    lm = chatty(style, "gemma")
    with pytest.raises(ValueError, match=f"messages: .*{reason}") as caught:
        lm.chat([{"role": "system", "content": "Be kind."}, *turns("Tom?")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "messages",
    ["Tom?", {"role": "user", "content": "a"}, [], ["a"], [{"role": "user"}], [{"role": "user", "content": 3}], 3],
)
def test_what_is_no_conversation(messages):
    with pytest.raises(ValueError, match="messages: expected a list"):
        chatty("chatml", "qwen").chat(messages)


def test_a_text_that_a_template_leaves_out_is_missed():
    lm = chatty("chatml", "qwen")
    with pytest.raises(ValueError, match=r"texts of messages \[\], expected \[0\]"):
        lm.chat(turns(lm.encode("a")), chat_template="{{ messages[0]['role'] }}")


def test_without_a_template():
    made = FAMILIES["qwen"].make()
    with pytest.raises(ValueError, match="no chat template"):
        LanguageModel(chatty("chatml", "qwen").model, made).chat(turns("a"))
