"""One contract for every architecture: whatever the network does inside, the engine says what a plain loop says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product

import pytest
import torch
import transformers as hf
from packing import packing, scored, spied
from peft import LoraConfig
from reference import Law, Plain, tokens
from tiny import tiny_tokenizer

from lmppl import LanguageModel, text
from lmppl.distributions import Completion, NextToken
from lmppl.engine.decoding import Decoder, shares_prompts
from lmppl.engine.reading import supports_trees
from lmppl.engine.recomputing import decoder
from lmppl.engine.unembedding import hidden_states, splits, unembed
from lmppl.text import PAD

pytestmark = pytest.mark.usefixtures("double_precision")

V = 7
IDS = {"vocab_size": V, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": None}
SHAPE = {**IDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON = {**SHAPE, "intermediate_size": 32, "max_position_embeddings": 64}
GROUPED = {**COMMON, "num_key_value_heads": 1}
WINDOW = 4  # smaller than the texts
TURN = 7  # where texts begin to be long: within the texts, and within a prompt
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": TURN}


def rope(kind: str, **parameters: object) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 1e4, **parameters}


CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "gpt2": lambda: hf.GPT2Config(**IDS, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "gpt-neo": lambda: hf.GPTNeoConfig(
        **IDS,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=64,
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**COMMON),
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi": lambda: hf.PhiConfig(**COMMON),
    "phi3-longrope": lambda: hf.Phi3Config(
        **GROUPED, original_max_position_embeddings=TURN, rope_parameters=rope("longrope", **LONGROPE)
    ),
    "phimoe-longrope": lambda: hf.PhimoeConfig(
        **GROUPED,
        num_local_experts=2,
        num_experts_per_tok=2,
        rope_parameters=rope("longrope", **LONGROPE, short_mscale=1.0, long_mscale=1.5),
    ),
    "llama-dynamic": lambda: hf.LlamaConfig(**GROUPED, rope_parameters=rope("dynamic", factor=2.0)),
    "llama-yarn": lambda: hf.LlamaConfig(
        **GROUPED, rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=TURN)
    ),
    "llama-linear": lambda: hf.LlamaConfig(**GROUPED, rope_parameters=rope("linear", factor=4.0)),
    "llama3": lambda: hf.LlamaConfig(
        **GROUPED,
        rope_parameters=rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=TURN
        ),
    ),
    "ministral3": lambda: hf.Ministral3Config(
        **GROUPED,
        head_dim=8,
        sliding_window=None,
        rope_parameters=rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=TURN,
            llama_4_scaling_beta=0.5,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        **GROUPED,
        head_dim=8,
        intermediate_size_mlp=32,
        num_local_experts=2,
        num_experts_per_tok=2,
        attention_chunk_size=TURN,
        floor_scale=WINDOW,
        no_rope_layers=[1, 0],
    ),
    "opt": lambda: hf.OPTConfig(**SHAPE, ffn_dim=32, max_position_embeddings=64, word_embed_proj_dim=16),
    "falcon": lambda: hf.FalconConfig(**SHAPE, max_position_embeddings=64),
    "falcon-alibi": lambda: hf.FalconConfig(**SHAPE, alibi=True, max_position_embeddings=64),
    "bloom": lambda: hf.BloomConfig(**IDS, hidden_size=16, n_layer=2, n_head=2),
    "mamba": lambda: hf.MambaConfig(**IDS, hidden_size=16, num_hidden_layers=2, state_size=4),
    "rwkv": lambda: hf.RwkvConfig(**IDS, hidden_size=16, num_hidden_layers=2, context_length=64),
    "recurrent-gemma": lambda: hf.RecurrentGemmaConfig(
        **{**GROUPED, "num_hidden_layers": 3}, head_dim=8, attention_window_size=WINDOW, lru_width=16
    ),
    "qwen3-next": lambda: hf.Qwen3NextConfig(
        **GROUPED,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=2,  # all, so that rounding to half precision cannot flip the choice
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
}


PACKED = {
    "gpt2",
    "gpt-neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi",
    "opt",
    "phi3-longrope",
    "phimoe-longrope",
    "llama-dynamic",
    "llama-yarn",
    "llama-linear",
    "llama3",
    "ministral3",
}  # the others go one row a text
UNCACHED = {"rwkv", "recurrent-gemma"}  # their states cannot be reordered: decoding reads each text anew
COUNTING = {"llama4"}  # attention counts padding: decoding pads none
UNREPEATABLE = {"qwen3-next"}  # adapters of its experts cannot be computed again

every_architecture = pytest.mark.parametrize("arch", CONFIGS)


def network(arch: str, dtype: torch.dtype = torch.float64, add_bos: bool = False, std: float = 0.4) -> LanguageModel:
    """A tiny random network whose distributions are far from uniform."""
    # torch's grouped product of experts, the default, is for single and half precision only.
    experts = "eager" if dtype == torch.float64 else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(CONFIGS[arch](), dtype=dtype, experts_implementation=experts)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=std)
    return LanguageModel(model, tiny_tokenizer(V, add_bos=add_bos))


shared = lru_cache(network)
"""A network that a test only reads."""


def another(arch: str) -> LanguageModel:
    """A network like the shared one, and what trials have shown of that."""
    lm, tried = network(arch), shared(arch)
    supports_trees(tried)
    lm.network.facts.update(tried.network.facts)
    return lm


def ragged(lengths: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Random texts of these lengths, without eos."""
    ids = torch.randint(1, V, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], PAD)


PROMPTS = ragged([6, 1, 3, 9], seed=1)
STOP = torch.tensor([0])

# Peft names expert layers that "all-linear" leaves out anyway.
moe = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")


# Scoring --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [False, True])
@every_architecture
def test_scores_equal_a_plain_loop(arch, add_bos):
    """Prompts and texts of unequal lengths in one batch, an empty one of each among them."""
    lm = shared(arch, add_bos=add_bos)
    prompts = text.cat(torch.full((5, 1), PAD), ragged([6, 1, 0, 9, 3], seed=1))
    value = text.cat(ragged([2, 8, 5, 0, 7], seed=2), STOP)
    d = Completion(lm, prompts, max_tokens=8)
    with torch.no_grad():
        by_token, by_prefix = d.token_log_probs(value), d.prefix_log_probs(value)
    for n in range(5):
        law = Law(Plain(lm), tokens(prompts[n]), max_tokens=8)
        z = tokens(value[n])
        expected = [law.step(z[:t])[v] for t, v in enumerate(z)]
        assert by_token[n, : len(z)].tolist() == pytest.approx(expected, abs=1e-10)
        assert by_prefix[n].tolist() == pytest.approx(law.prefix_log_probs(z, 9), abs=1e-10)


@every_architecture
def test_packed_is_plain_or_falls_back(arch):
    """Every prefix of two texts, an observation after each, as in a GFlowNet's reward."""
    lm = shared(arch)
    assert supports_trees(lm) == (arch in PACKED)
    context = text.cat(PROMPTS[3], text.prefixes(ragged([5, 4], seed=3), stop=0))  # (P, 2, L)
    y = text.cat(ragged([3], seed=4)[0], STOP)
    grads = []
    for always in (False, True):
        with packing(always), spied(lm) as sizes:
            log_probs = scored(lm, context, y)
        grads.append(torch.autograd.grad(log_probs.mean(), lm.trainable_parameters(), allow_unused=True))
    for a, b in zip(*grads, strict=True):
        assert a is b is None or (a - b).abs().max() < 1e-10 * (1 + b.abs().max())
    distinct = len(torch.unique(context.flatten(0, 1), dim=0))
    assert (sum(sizes) < distinct * 17) == (arch in PACKED)
    for p, n in product(range(len(context)), range(2)):
        law = Law(Plain(lm), tokens(context[p, n]), max_tokens=8)
        expected = [law.step(tokens(y)[:t])[v] for t, v in enumerate(tokens(y))]
        assert log_probs[p, n].tolist() == pytest.approx(expected, abs=1e-10)


# Decoding -------------------------------------------------------------------------------------------------------------


@every_architecture
def test_what_was_drawn_scores_as_it_was_drawn(arch):
    """log q of the cached steps equals `log_prob`, and of a text regrown behind what it keeps."""
    lm = shared(arch)
    d = Completion(lm, PROMPTS, max_tokens=8, min_tokens=4)
    z, log_prob = d.sample_and_log_prob((3,))
    assert (d.log_prob(z) - log_prob).abs().max() < 1e-10
    law = Law(Plain(lm), tokens(PROMPTS[0]), max_tokens=8, min_tokens=4)
    assert log_prob[1, 0].item() == pytest.approx(law.log_prob(tokens(z[1, 0])), abs=1e-10)
    keep = torch.tensor([3, 2, 4, 3])
    again, rest = d.regrow(z, keep)
    kept = torch.arange(z.shape[-1]) < keep[:, None]
    assert torch.equal(again.where(kept, PAD), z.where(kept, PAD))
    assert (d.token_log_probs(again).masked_fill(kept, 0.0).sum(-1) - rest).abs().max() < 1e-10


@pytest.mark.parametrize("share", [False, True], ids=["repeated prompts", "shared prompts"])
@every_architecture
def test_steps_predict_what_each_row_has_read(arch, share):
    """Rows repeated, dropped and reordered between steps, as SMC does, from prompts of unequal length."""
    lm, loop = shared(arch), Plain(shared(arch))
    index = torch.tensor([0, 1, 1, 3, 2])
    assert shares_prompts(lm) == (arch in PACKED)
    alike = lm.network.rotary.turn is None
    shares = share and arch in PACKED and alike
    steps = Decoder(lm, PROMPTS, index, share=True) if shares else decoder(lm, PROMPTS, index)
    assert isinstance(steps, Decoder) == (arch not in UNCACHED | COUNTING and alike)
    rows = [tokens(PROMPTS[i]) for i in index]
    g = torch.Generator().manual_seed(0)
    for t in range(7):
        drawn = torch.randint(V, (len(rows), 2 if t == 3 else 1), generator=g)
        steps.step(drawn)
        rows = [row + tuple(new) for row, new in zip(rows, drawn.tolist(), strict=True)]
        if t in (1, 3, 4):
            order = torch.randint(len(rows), (len(rows) - (t == 3),), generator=g)
            steps.select(order)
            rows = [rows[i] for i in order]
        expected = torch.stack([loop.logits(row) for row in rows])
        assert (steps.logits - expected).abs().max() < 1e-10


# Adapters -------------------------------------------------------------------------------------------------------------


def adapted(lm: LanguageModel) -> LanguageModel:
    return lm.with_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def gradients(loss: torch.Tensor, view: LanguageModel) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, view.trainable_parameters(), retain_graph=True))


@moe
@every_architecture
def test_an_adapter_gets_the_gradient_of_a_plain_loop(arch):
    lm = another(arch)
    view = adapted(lm)
    value = text.cat(ragged([2, 8, 5, 7], seed=2), STOP)
    loss = Completion(view, PROMPTS, max_tokens=8).log_prob(value).sum()
    plain = torch.zeros(())
    for prompt, z in zip(PROMPTS, value, strict=True):
        z, row = tokens(z), tokens(prompt) + tokens(z)
        for t, v in enumerate(z[:8]):
            read = torch.tensor([row[: len(row) - len(z) + t]])
            plain = plain + view.forward(read, use_cache=False).logits[0, -1].log_softmax(-1)[v]
    found, expected = gradients(loss, view), gradients(plain, view)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-10)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-10 * (1 + b.abs().max())
    assert sum(bool(g.any()) for g in found) >= 0.9 * len(found)
    with pytest.raises(RuntimeError):  # the base takes no part
        torch.autograd.grad(loss, lm.trainable_parameters(), retain_graph=True)


@moe
@every_architecture
def test_two_adapters_do_not_disturb_one_another(arch):
    lm = another(arch)
    value = text.cat(ragged([4, 7, 2, 5], seed=2), STOP)

    def log_prob(view: LanguageModel) -> torch.Tensor:
        return Completion(view, PROMPTS, max_tokens=7).log_prob(value)

    base = log_prob(lm).detach()
    views = [adapted(lm), adapted(lm)]
    alone = [log_prob(view) for view in views]
    grads = [gradients(x.sum(), view) for x, view in zip(alone, views, strict=True)]
    assert (alone[0] - alone[1]).abs().min() > 1e-3 and (alone[0] - base).abs().min() > 1e-3
    first, second, third = log_prob(views[0]), log_prob(views[1]), log_prob(lm)
    assert torch.equal(first, alone[0]) and torch.equal(second, alone[1]) and torch.equal(third, base)
    for view, own in zip(views, grads, strict=True):
        joint = gradients((first + second).sum(), view)
        assert all(torch.equal(a, b) for a, b in zip(joint, own, strict=True))


class Several:
    """Packed and plain rows of two adapters and the base in one loss."""

    def __init__(self, lm: LanguageModel):
        self.views = [adapted(lm), adapted(lm), lm]
        self.parameters = [p for view in self.views for p in view.trainable_parameters()]
        self.context = text.cat(PROMPTS[3], text.prefixes(ragged([3, 2], seed=3), stop=0))  # (P, 2, L)
        self.y = text.cat(ragged([2], seed=4)[0], STOP)

    def loss(self) -> torch.Tensor:
        with packing(True):
            return sum(scored(view, self.context, self.y).mean() * (i + 1) for i, view in enumerate(self.views))

    def gradient(self, loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(loss, self.parameters, allow_unused=True)


def assert_same(found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() < 1e-10 * (1 + b.abs().max())


@moe
@every_architecture
def test_what_exceeds_the_token_budget_or_is_checkpointed_is_computed_again_as_it_was(arch):
    """The gradient of a large budget, and without checkpointing."""
    lm = another(arch)
    several, grads, again = Several(lm), [], []
    for budget in (1000, 30):
        for view in several.views:
            view.token_budget = budget
        loss = several.loss()
        before = lm.tokens_scored
        grads.append(several.gradient(loss))
        again.append(lm.tokens_scored - before)
    assert again[0] == 0 < again[1]
    assert_same(*grads)
    for view in several.views:
        view.token_budget = 1000
    lm.model.activation_checkpointing_enable()
    if arch in UNREPEATABLE:
        with pytest.raises(RuntimeError, match="gradient checkpointing"):
            several.loss()
        return
    assert_same(several.gradient(several.loss()), grads[0])


# Large vocabularies, half precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted(CONFIGS))
def test_hidden_states_and_head_give_the_logits(arch):
    """What a large vocabulary needs (test_logits.py), here with a small one."""
    lm = shared(arch)
    ids = ragged([9, 9], seed=5)
    with torch.no_grad():
        parts = unembed(lm, hidden_states(lm, ids, use_cache=False).flatten(0, 1))
        whole = lm.model(ids, use_cache=False).logits
    assert splits(lm) and (parts - whole.flatten(0, 1)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_architecture
def test_half_precision_gives_log_probabilities_in_single(arch, dtype):
    """Within 32 roundings of the same weights in single precision, a token; and normalised as single precision is."""
    lm, single = (network(arch, dtype, std=0.2) for _ in range(2))
    single.model.float()
    value = text.cat(ragged([2, 8, 5, 7], seed=2), STOP)
    found, expected = (Completion(each, PROMPTS, max_tokens=8) for each in (lm, single))
    tolerance = 32 * torch.finfo(dtype).eps
    with torch.no_grad():
        by_token = found.token_log_probs(value)
        assert (by_token - expected.token_log_probs(value)).abs().max() < tolerance
        z, log_prob = found.sample_and_log_prob((4,))
        assert (found.log_prob(z) - log_prob).abs().max() < 2 * tolerance
        next_token = NextToken(lm, PROMPTS).logits
        growing = found.token_steps()
        steps = torch.stack([growing.score(torch.full((len(PROMPTS),), v)) for v in range(V)], -1)
    assert {x.dtype for x in (by_token, log_prob, next_token, steps)} == {torch.float32}
    for distribution in (next_token, steps):
        assert (distribution.double().exp().sum(-1) - 1).abs().max() < 8 * torch.finfo(torch.float32).eps
    everything = Completion(lm, PROMPTS, max_tokens=1).enumerate_support()[:, 0]
    with torch.no_grad():
        total = Completion(lm, PROMPTS, max_tokens=1).log_prob(everything[:, None]).double().exp().sum(0)
    # Each text is scored in a pass of its own, and these round each for itself.
    assert (total - 1).abs().max() < tolerance
