"""An instruct model of 135 million parameters and 49,152 tokens: what holds on toys holds there."""

from __future__ import annotations

import math
import re

import pyro
import pytest
import torch
from peft import LoraConfig
from transformers import GenerationConfig

from lmppl import LanguageModel, text
from lmppl.constraints import regex
from lmppl.distributions import Completion
from lmppl.inference import SMC, AutoGuide, GFlowNet, Importance

QUESTION = [{"role": "user", "content": "Name a fruit that is red. Answer with one word."}]
ROUNDING = 2e-3  # nats: float32 logits of some 20 tokens, by passes of other shapes


@pytest.fixture(scope="module")
def lm(smollm2_lm) -> LanguageModel:
    return smollm2_lm


def log_softmax(lm: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """(L, V), by transformers' own pass over one text."""
    with torch.no_grad():
        return lm.model(ids[None]).logits[0].double().log_softmax(-1)


def test_a_conversation_is_read_as_the_tokenizer_writes_it(lm):
    turns = [*QUESTION, {"role": "assistant", "content": "Apple"}, {"role": "user", "content": "And a green one?"}]
    own = lm.tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
    z = lm.encode(["Apple", "An apple."], stop="eos")
    found = lm.chat([*QUESTION, {"role": "assistant", "content": z}, turns[-1]])
    assert lm.chat(turns).tolist() == own and text.equal(found[0], torch.tensor(own))
    y = lm.encode("Lime", stop="eos")
    log_p = log_softmax(lm, torch.cat([torch.tensor(own), y]))
    expected = float(log_p[len(own) - 1 : -1].gather(1, y[:, None]).sum())
    with torch.no_grad():
        assert float(Completion(lm, found, max_tokens=4).log_prob(y)[0]) == pytest.approx(expected, abs=ROUNDING)


def test_a_word_that_is_filled_in_with_its_space_is_written_as_in_the_string(lm):
    whole = lm.encode("The capital of Spain is")
    assert torch.equal(lm.fill("The capital of{x} is", x=lm.encode(" Spain")), whole)
    assert torch.equal(lm.fill("The capital of {x} is", x="Spain"), whole)
    apart = lm.fill("The capital of {x} is", x=lm.encode("Spain"))
    assert len(apart) == len(whole) + 1 and lm.decode(apart) == lm.decode(whole)


def test_greedy_decoding_is_generates(lm):
    prompt = lm.chat(QUESTION)
    cold = Completion(lm, prompt, max_tokens=12, temperature=1e-4).sample()
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=list(lm.eos_ids), pad_token_id=0)
    own = lm.model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], generation_config=config)
    assert lm.decode(cold) == lm.decode(own[0, len(prompt) :])


def test_what_is_drawn_scores_as_it_was_drawn_beside_prompts_of_other_lengths(lm):
    story = lm.encode("Once upon a time there was a girl who lived beside the sea, and every day she walked. " * 40)
    x = torch.stack([text.pad(story[:n], 700) for n in (3, 40, 700)])
    fn = Completion(lm, x, max_tokens=10, stop=".")
    pyro.set_rng_seed(0)
    z, drawn = fn.sample_and_log_prob((2,))
    with torch.no_grad():
        assert (fn.log_prob(z) - drawn).abs().max() < ROUNDING
        for i, n in enumerate((3, 40, 700)):
            alone = Completion(lm, story[:n], max_tokens=10, stop=".").log_prob(z[:, i])
            assert (alone - drawn[:, i]).abs().max() < ROUNDING


def test_a_pattern_leads_to_no_dead_end_and_decoded_texts_match_it(lm):
    pattern = r" \d+%\."
    allowed = regex(lm, pattern, stop=".")
    fn = Completion(lm, "The battery is charged to", max_tokens=12, stop=".", allowed=allowed)
    pyro.set_rng_seed(0)
    z = fn.sample((32,))
    said = [s for s, whole in zip(lm.decode(z), text.length(z) <= 12, strict=True) if whole]  # others are cut
    assert len(said) > 20 and all(re.fullmatch(pattern, s) for s in said)


def answering(lm: LanguageModel):
    def model(y):
        z = pyro.sample("z", Completion(lm, lm.chat(QUESTION), max_tokens=8))
        turns = [*QUESTION, {"role": "assistant", "content": z}, {"role": "user", "content": "Its colour?"}]
        pyro.sample("y", Completion(lm, lm.chat(turns), max_tokens=3), obs=y)

    return model


def test_importance_sampling_and_smc_agree_about_a_conversation(lm):
    y = lm.encode("Red.", stop="eos")
    pyro.set_rng_seed(0)
    runs = {
        kind: torch.stack([kind(answering(lm), num_particles=16).run(y).log_evidence for _ in range(6)]).double().exp()
        for kind in (Importance, SMC)
    }
    means, errors = ([f(r) for r in runs.values()] for f in (torch.mean, lambda r: r.std() / math.sqrt(len(r))))
    assert abs(float(means[0] - means[1])) < 5 * float((errors[0] ** 2 + errors[1] ** 2).sqrt())


def test_a_step_of_training_moves_the_adapter_and_nothing_else(lm):
    y = lm.encode("Red.", stop="eos")
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    guide = AutoGuide(
        answering(lm),
        LoraConfig(r=4, target_modules="all-linear"),
        [{"role": "user", "content": "Something is {y} Name it in one word."}],
        args=(y,),
    )
    optimizer = torch.optim.AdamW(guide.trainable_parameters(), lr=1e-3)
    trainer = GFlowNet(answering(lm), guide, optimizer=optimizer, num_particles=4)
    figures = trainer.step(y)
    assert math.isfinite(figures["loss"]) and any(bool(p.any()) for p in guide.trainable_parameters())
    after = {name.replace(".base_layer", ""): p for name, p in lm.model.named_parameters()}
    assert all(torch.equal(after[name], p) for name, p in before.items())
