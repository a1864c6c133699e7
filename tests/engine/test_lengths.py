"""Positions that depend on how long a text is: each token's law is what reading the text so far, alone, says."""

from __future__ import annotations

import pyro
import pytest
import torch
import transformers as hf
from packing import packing
from peft import LoraConfig
from reference import Law, Plain, tokens
from tiny import tiny_tokenizer

from lmppl import LanguageModel, text
from lmppl.distributions import Completion, NextToken
from lmppl.inference import SMC, Enumeration
from lmppl.text import PAD

V = 6
TURN = 16
ROUNDING = 1e-5  # of norms and rotary factors, which are in single precision
LENGTHS = [
    3,
    TURN - 5,
    TURN - 4,
    TURN - 1,
    TURN,
    TURN + 1,
    TURN + 9,
]  # below, crossing, at, above, with four tokens more
SHAPE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": None,
}


def rope(kind: str, **parameters: object) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 100.0, **parameters}


def network(config: hf.PreTrainedConfig) -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=0.4)
    return LanguageModel(model, tiny_tokenizer(V))


def longrope() -> LanguageModel:
    factors = {"short_factor": [1.0] * 4, "long_factor": [5.0] * 4, "original_max_position_embeddings": TURN}
    return network(
        hf.Phi3Config(
            **SHAPE,
            max_position_embeddings=64,
            original_max_position_embeddings=TURN,
            rope_parameters=rope("longrope", **factors),
        )  # fmt: skip
    )


def dynamic() -> LanguageModel:
    return network(hf.LlamaConfig(**SHAPE, max_position_embeddings=TURN, rope_parameters=rope("dynamic", factor=3.0)))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return longrope()


def prompts(lengths: list[int]) -> torch.Tensor:
    """Texts without eos of these lengths."""
    ids = torch.randint(1, V, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    return ids.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], PAD)


def test_the_factors_matter(lm):
    ids = prompts([TURN + 1])
    with torch.no_grad():
        short, long = (lm.reading(long=long).forward(ids[:, :TURN]).logits[:, -1] for long in (False, True))
        assert (short - long).abs().max() > 0.1
        assert torch.equal(short, lm.model(ids[:, :TURN]).logits[:, -1])
        assert torch.equal(lm.reading(long=True).forward(ids).logits, lm.model(ids).logits)


def test_every_law_is_that_of_a_loop_of_plain_passes(lm):
    x = prompts(LENGTHS)
    d = Completion(lm, x, max_tokens=4)
    z, drawn = d.sample_and_log_prob((2,))
    by_prefix = d.prefix_log_probs(z)
    for n, prompt in enumerate(x):
        law = Law(Plain(lm), tokens(prompt), max_tokens=4)
        for s in range(2):
            value = tokens(z[s, n])
            assert drawn[s, n].item() == pytest.approx(law.log_prob(value), abs=ROUNDING)
            assert by_prefix[s, n].tolist() == pytest.approx(law.prefix_log_probs(value, 5), abs=ROUNDING)
        assert NextToken(lm, prompt).logits.tolist() == pytest.approx(law.next(()).tolist(), abs=ROUNDING)


def test_drawn_is_scored_alone_and_beside_others(lm):
    x = prompts(LENGTHS)
    together = Completion(lm, x, max_tokens=6, stop=None)
    z, drawn = together.sample_and_log_prob((3,))
    torch.testing.assert_close(together.log_prob(z), drawn, rtol=0, atol=ROUNDING)
    for n, prompt in enumerate(x):
        alone = Completion(lm, prompt, max_tokens=6, stop=None)
        torch.testing.assert_close(alone.log_prob(z[:, n]), drawn[:, n], rtol=0, atol=ROUNDING)
        z_n, drawn_n = alone.sample_and_log_prob((3,))
        torch.testing.assert_close(together.log_prob(z_n[:, None])[:, n], drawn_n, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("budget", [16_384, 30])
@pytest.mark.parametrize("packed", [True, False])
def test_packed_is_plain_in_value_and_gradient(packed, budget):
    """Observations after each prefix of a text that crosses over, as the objectives score them."""
    lm = longrope()
    view = lm.with_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    x, z, y = prompts([TURN - 3]), prompts([5, 5, 5]), torch.tensor([2, 3, 1])
    context = text.cat(x, text.prefixes(z, stop=4))  # (P, 3, L)
    expected = torch.tensor(
        [[Law(Plain(view), tokens(row), 3, stops=()).log_prob((2, 3, 1)) for row in rows] for rows in context]
    )
    view.token_budget = budget
    with packing(packed):
        found = Completion(view, context, max_tokens=3, stop=None).log_prob(y)
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=ROUNDING)
        own = view.trainable_parameters()
        gradient = torch.autograd.grad(found.sum(), own)
    one_by_one = sum(
        view.forward(torch.tensor([tokens(row) + (2, 3, 1)[:t]])).logits[0, -1].log_softmax(-1)[v]
        for row in context.flatten(0, 1)
        for t, v in enumerate((2, 3, 1))
    )
    for a, b in zip(gradient, torch.autograd.grad(one_by_one, own), strict=True):
        assert (a - b).abs().max() <= ROUNDING * (1 + b.abs().max())


def test_smc_across_the_turn_gives_the_evidence(lm):
    """Particles repeated, dropped and reordered while they cross over, against a complete enumeration."""
    x = prompts([TURN - 2])[0]

    def model():
        z = pyro.sample("z", Completion(lm, x, max_tokens=3))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=2, stop=None), obs=torch.tensor([2, 3]))

    exact = Enumeration(model).run().log_evidence
    pyro.set_rng_seed(0)
    runs = torch.stack([SMC(model, num_particles=100, twist="stop").run().log_evidence for _ in range(20)])
    ratio = (runs - exact).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / len(ratio) ** 0.5


def test_what_was_read_before_leaves_no_trace(lm):
    """Kept prompts and the module's own factors: short after long is short."""
    x = prompts([TURN - 4])
    short, long = (Completion(lm, x, max_tokens=n, stop=None) for n in (3, 9))
    value = prompts([9])
    with torch.no_grad():
        before = [short.log_prob(value[:, :3]), long.log_prob(value)]
        lm.model(prompts([TURN + 20]))
        for _ in range(2):
            now = [short.log_prob(value[:, :3]), long.log_prob(value)]
            torch.testing.assert_close(now, before, rtol=0, atol=ROUNDING)


def test_dynamic_factors_are_those_of_the_context_whatever_was_read_before():
    """Within the context they are fixed; what exceeds it is refused."""
    lm = dynamic()
    x = prompts([TURN - 3, 4])
    d = Completion(lm, x, max_tokens=3, stop=None)
    value = prompts([3, 3])
    with torch.no_grad():
        before, whole = d.log_prob(value), lm.forward(prompts([TURN])).logits
        lm.model(prompts([3 * TURN]))  # transformers keeps the factors that this one had
        assert torch.equal(lm.forward(prompts([TURN])).logits, whole)
        torch.testing.assert_close(d.log_prob(value), before, rtol=0, atol=ROUNDING)
        z, drawn = d.sample_and_log_prob((4,))
        torch.testing.assert_close(d.log_prob(z), drawn, rtol=0, atol=ROUNDING)
    with pytest.raises(ValueError, match="this model's context holds 16"):
        Completion(lm, x, max_tokens=4, stop=None)
