"""The engine: packed scoring is plain scoring, on networks that it fits and others, and memory stays bounded."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import V, packing, scored, spied, stopped_prefixes
from peft import LoraConfig
from reference import Plain, tokens
from tiny import ARCHITECTURES, tiny_lm, tiny_tokenizer

from lmppl import LanguageModel
from lmppl.distributions import Completion, NextToken
from lmppl.engine import reading
from lmppl.engine.decoding import Decoder
from lmppl.engine.reading import supports_trees
from lmppl.engine.recomputing import decoder
from lmppl.engine.tuning import TUNING
from lmppl.text import PAD

pytestmark = pytest.mark.usefixtures("double_precision")

# Packed is plain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_is_plain_in_log_prob_and_gradient(arch):
    """Every prefix of 3 texts in 2 plate elements, an observation after each: the shape of a GFlowNet's reward."""
    lm = tiny_lm(arch, vocab=V, tried=False)
    assert supports_trees(lm)
    g = torch.Generator().manual_seed(0)
    z = torch.randint(1, V, (3, 2, 5), generator=g)  # (particle, plate, L)
    z[1, 0, 3:] = PAD
    prompt = torch.tensor([[2, 3, PAD, PAD], [4, 5, 2, 3]])
    context = stopped_prefixes(prompt, z)  # (P, particle, plate, L)
    y = torch.randint(1, V, (2, 4), generator=g)
    y[0, 2:] = PAD
    results = {}
    for packed in (True, False):
        with packing(packed), spied(lm) as sizes:
            log_probs = scored(lm, context, y)
            grads = torch.autograd.grad(log_probs.sum(), lm.trainable_parameters(), allow_unused=True)
        results[packed] = log_probs, [g for g in grads if g is not None], sum(sizes)
    assert results[True][0].shape == (6, 3, 2, 4)
    assert (results[True][0] - results[False][0]).abs().max() < 1e-10
    for a, b in zip(results[True][1], results[False][1], strict=True):
        assert (a - b).abs().max() < 1e-10 * (1 + b.abs().max())
    assert results[True][2] < 0.75 * results[False][2]  # tokens


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_gradient_of_an_adapter(arch):
    lm = tiny_lm(arch, vocab=V).with_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    context = stopped_prefixes(torch.tensor([2, 3]), torch.tensor([[2, 4, 3], [5, 4, 2]]))
    y = torch.tensor([3, 2, 0])
    grads = []
    for packed in (True, False):
        with packing(packed):
            grads.append(torch.autograd.grad(scored(lm, context, y).sum(), lm.trainable_parameters()))
    assert all((a - b).abs().max() < 1e-9 * (1 + b.abs().max()) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("again", [False, True], ids=["", "layers again"])
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sliding window", "alternating windows, soft caps"])
def test_attention_in_blocks_is_attention_at_once(arch, again, monkeypatch):
    """One to three queries at a time of a root, two trunks and their branches: the same log-probs and gradient."""
    lm = UNUSUAL[arch]() if arch in UNUSUAL else tiny_lm(arch, vocab=V)
    view = lm.with_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    z = torch.randint(1, V, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    context = stopped_prefixes(torch.tensor([2, 3, 4, 5, 2, 3, 4]), z)
    y = torch.tensor([3, 2, 0])
    found = []
    for scores in (TUNING.scores, 200):
        monkeypatch.setattr(TUNING, "scores", scores)
        if again and scores == 200:
            monkeypatch.setattr(TUNING, "activations", 1)
        with packing(True):
            log_probs = scored(view, context, y)
            found.append((log_probs, *torch.autograd.grad(log_probs.sum(), view.trainable_parameters())))
            with torch.no_grad():
                assert (scored(view, context, y) - log_probs).abs().max() < 1e-12
    assert all((a - b).abs().max() < 1e-9 * (1 + b.abs().max()) for a, b in zip(*found, strict=True))


@st.composite
def problems(draw):
    """A context (*batch, L) grown by prefixes of earlier rows, and a value whose leading axes broadcast with it."""
    batch = draw(st.lists(st.integers(1, 3), min_size=0, max_size=4))
    seed = draw(st.integers(0, 2**16))
    g = torch.Generator().manual_seed(seed)
    shared = torch.randint(0, V, (12,), generator=g)
    rows = torch.Size(batch).numel()
    # Each row keeps a random number of the shared tokens, then goes its own way for a random number.
    lengths = torch.randint(0, 9, (rows, 2), generator=g)
    context = torch.full((rows, 16), PAD)
    for i, (n, m) in enumerate(lengths.tolist()):
        context[i, :n] = shared[:n]
        context[i, n : n + m // 2] = torch.randint(0, V, (m // 2,), generator=g)
    width = draw(st.integers(1, 4))
    lead = [n if draw(st.booleans()) else 1 for n in batch]
    value = torch.randint(0, V, (*lead, width), generator=g)
    cut = torch.randint(0, width + 1, (*lead, 1), generator=g)
    value = value.masked_fill(torch.arange(width) >= cut, PAD)
    return context.view(*batch, 16), value


NETWORKS: dict[str, LanguageModel] = {}
WINDOWED = ("sliding window", "alternating windows, soft caps")


@settings(max_examples=40)
@given(problems(), st.sampled_from((*ARCHITECTURES, *WINDOWED)), st.booleans(), st.integers(5, 200))
def test_any_tree_scores_as_plain_rows(problem, arch, budgeted, budget):
    lm = NETWORKS.get(arch) or NETWORKS.setdefault(arch, UNUSUAL[arch]() if arch in UNUSUAL else tiny_lm(arch, vocab=V))
    context, value = problem
    lm.token_budget = budget if budgeted else 16_384
    with torch.no_grad():
        with packing(True):
            packed = scored(lm, context, value)
        with packing(False):
            plain = scored(lm, context, value)
        chosen = scored(lm, context, value)
    batch = torch.broadcast_shapes(context.shape[:-1], value.shape[:-1])
    assert packed.shape == (*batch, value.shape[-1])
    assert (packed - plain).abs().max() < 1e-9 and (chosen - plain).abs().max() < 1e-9
    # One row, once more by a loop of forward passes.
    loop = Plain(lm)
    row = torch.randint(max(1, batch.numel()), ()).item()
    c, v = (x.expand(*batch, -1).reshape(-1, x.shape[-1])[row] for x in (context, value))
    for t, token in enumerate(tokens(v)):
        expected = loop.logits(tokens(c), tokens(v)[:t]).log_softmax(-1)[token]
        assert plain.view(-1, value.shape[-1])[row, t].item() == pytest.approx(expected.item(), abs=1e-9)


def test_sharing_is_found_and_saves_tokens():
    lm = tiny_lm("llama", vocab=V)
    prompt = torch.randint(1, V, (20,), generator=torch.Generator().manual_seed(0))
    context = stopped_prefixes(prompt, torch.randint(1, V, (4, 8)))  # (9, 4, L)
    y = torch.randint(1, V, (5,))
    with torch.no_grad():
        with spied(lm) as chosen:
            scored(lm, context, y)
        with packing(False), spied(lm) as plain:
            scored(lm, context, y)
    assert sum(chosen) < 0.5 * sum(plain)


# Networks that packing does not fit -----------------------------------------------------------------------------------

SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": None,
}
LAYERED = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 64, "num_key_value_heads": 1}


def wrapped(config: transformers.PreTrainedConfig, **kwargs) -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64, **kwargs)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=0.4)
    return LanguageModel(model, tiny_tokenizer(V))


def alibi() -> LanguageModel:
    named = {k: v for k, v in SMALL.items() if k not in ("num_hidden_layers", "num_attention_heads")}
    return wrapped(transformers.BloomConfig(**named, n_layer=2, n_head=2))


UNUSUAL = {
    "sliding window": lambda: wrapped(transformers.MistralConfig(**LAYERED, sliding_window=4)),
    "wide sliding window": lambda: wrapped(transformers.MistralConfig(**LAYERED, sliding_window=20)),
    "alternating windows, soft caps": lambda: wrapped(
        transformers.Gemma2Config(**LAYERED, head_dim=8, sliding_window=4)
    ),
    "local attention": lambda: wrapped(
        transformers.GPTNeoConfig(
            vocab_size=V,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            max_position_embeddings=64,
            eos_token_id=0,
            bos_token_id=0,
        )
    ),
    "alibi": alibi,
    "recurrent": lambda: wrapped(
        transformers.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=0)
    ),
    "eager": lambda: wrapped(transformers.LlamaConfig(**LAYERED), attn_implementation="eager"),
    "positions with an offset": lambda: wrapped(
        transformers.OPTConfig(**SMALL, ffn_dim=32, max_position_embeddings=64, word_embed_proj_dim=16)
    ),
}
PLAIN_ONLY = {"local attention", "alibi", "recurrent"}


@pytest.mark.filterwarnings("ignore")  # kernels that are not installed
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_attention_is_right_or_falls_back(name):
    """Long shared prompts, many prefixes: scoring and sampling both equal a loop of plain forward passes."""
    lm = UNUSUAL[name]()
    assert supports_trees(lm) == (name not in PLAIN_ONLY)
    loop = Plain(lm)
    prompt = torch.randint(1, V, (25,), generator=torch.Generator().manual_seed(1))
    z = torch.tensor([[2, 3, 4, 5], [5, 4, 3, 2]])
    context = stopped_prefixes(prompt, z)
    y = torch.tensor([3, 2, 0])
    with torch.no_grad(), packing(True):
        log_probs = scored(lm, context, y)
    for p, n in [(0, 0), (2, 1), (4, 0)]:
        expected = [
            loop.logits(tokens(context[p, n]), tokens(y)[:t]).log_softmax(-1)[v] for t, v in enumerate([3, 2, 0])
        ]
        assert log_probs[p, n].tolist() == pytest.approx([float(e) for e in expected], abs=1e-9)

    assert isinstance(decoder(lm, prompt[None], torch.zeros(1, dtype=torch.long)), Decoder)
    d = Completion(lm, torch.stack([prompt, prompt.masked_fill(torch.arange(25) > 1, PAD)]), max_tokens=6, min_tokens=5)
    drawn, log_prob = d.sample_and_log_prob((4,))
    assert (d.log_prob(drawn) - log_prob).abs().max() < 1e-9
    expected = 0.0
    for t, v in enumerate(tokens(drawn[0, 1])[:6]):
        logits = loop.logits(tokens(prompt[:2]), tokens(drawn[0, 1])[:t]).clone()
        logits[0] = -torch.inf if t < 5 else logits[0]
        expected += float(logits.log_softmax(-1)[v])
    assert log_prob[0, 1].item() == pytest.approx(expected, abs=1e-9)


def test_a_window_that_does_not_reach_the_attention_is_no_tree():
    """The trial tree is 9 tokens deep: that a layer's window is 20 only the configuration knows."""
    lm = UNUSUAL["wide sliding window"]()
    assert reading.windows(lm) == [20, 20] and supports_trees(lm)
    lm = tiny_lm("llama", vocab=V, tried=False)
    lm.model.config.sliding_window = 20  # these layers hand no window on
    assert not supports_trees(lm)


def test_packing_leaves_the_attention_implementation_as_it_was():
    lm = tiny_lm("llama", vocab=V)
    before = lm.model.config._attn_implementation
    with packing(True):
        scored(lm, stopped_prefixes(torch.tensor([2]), torch.tensor([3, 4])), torch.tensor([2, 0]))
    assert lm.model.config._attn_implementation == before


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("budget", [40, 100, 1000])
def test_no_forward_pass_exceeds_the_token_budget(packed, budget):
    lm = tiny_lm("qwen2", vocab=V)
    lm.token_budget = budget
    prompt = torch.randint(1, V, (2, 7))
    d = Completion(lm, prompt, max_tokens=5)
    supports_trees(lm)
    with spied(lm) as sizes, packing(packed):
        z = d.sample((64,))
        d.log_prob(z)
        d.prefix_log_probs(z)
        rewards = Completion(lm, stopped_prefixes(prompt, z), max_tokens=3)
        rewards.log_prob(torch.tensor([2, 3, 0]))
        NextToken(lm, stopped_prefixes(prompt, z)).log_prob(torch.tensor(2))
    assert max(sizes) <= budget


def test_chunks_do_not_change_numbers():
    lm = tiny_lm("neox", vocab=V)
    context = stopped_prefixes(torch.tensor([2, 3, 4]), torch.randint(1, V, (8, 2, 5)))
    y = torch.tensor([3, 2, 0])
    whole = scored(lm, context, y)
    for lm.token_budget in (15, 60, 240):
        assert (scored(lm, context, y) - whole).abs().max() < 1e-9


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_reading_in_parts_is_reading_at_once(dtype, tolerance, packed, monkeypatch):
    """Values and gradients of the base network and of two adapters, whatever fits a processor's caches."""
    lm = tiny_lm("gpt2", vocab=V, dtype=dtype)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    context = stopped_prefixes(torch.tensor([2, 3, 4]), torch.randint(1, V, (6, 2, 5)))
    y = torch.tensor([3, 2, 0])
    for view in (lm, lm.with_adapter(config), lm.with_adapter(config)):
        found = {}
        for fewest in (24, 2**20):
            monkeypatch.setattr(TUNING, "cache", 0)
            monkeypatch.setattr(TUNING, "fewest", fewest)
            with packing(packed), spied(lm) as sizes:
                with torch.no_grad():
                    frozen = scored(view, context, y)
                largest = max(sizes)
                log_probs = scored(view, context, y)
                found[fewest] = frozen, log_probs, *torch.autograd.grad(log_probs.sum(), view.trainable_parameters())
            assert (largest <= 3 * 24) == (fewest == 24)
        for a, b in zip(*found.values(), strict=True):
            assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


def test_logits_in_parts_are_logits_at_once(monkeypatch):
    lm = tiny_lm("llama", vocab=V)
    context = stopped_prefixes(torch.tensor([2, 3, 4]), torch.randint(1, V, (6, 2, 5)))
    y = torch.tensor([3, 2, 0])
    monkeypatch.setattr(TUNING, "many_logits", 0)
    found = []
    with torch.no_grad():
        for at_once in (10, 2**20):
            monkeypatch.setattr(TUNING, "logits_at_once", at_once * V)
            found.append(scored(lm, context, y))
    assert (found[0] - found[1]).abs().max() < 1e-9


def test_rows_without_tokens_of_their_own_take_no_room():
    """Texts of 2 tokens in 8 columns: 2 of their 9 stopped prefixes leave the longest row, by 3 tokens each."""
    lm = tiny_lm("gpt2", vocab=V)
    z = torch.full((4, 8), PAD)
    z[:, :2] = torch.tensor([[2, 3], [3, 2], [4, 3], [5, 2]])
    context = stopped_prefixes(torch.tensor([2, 3, 4]), z)  # (9, 4, L): prompt, z_1..z_t, 0
    y = torch.tensor([5, 1, 1])
    supports_trees(lm)
    with spied(lm) as sizes:
        packed = scored(lm, context, y)
    assert sizes == [3 + 4 * (5 + 2 * 3)]  # root; of each text trunk (z_1 z_2 0 and y but its last) and branches
    with packing(False):
        assert (packed - scored(lm, context, y)).abs().max() < 1e-9


@pytest.mark.parametrize("first", ["base", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whoever_asks_first_decodes_prompts_of_several_lengths(first, dtype):
    """This network in double precision reads what is padded on the left as NaN, and on the right as it is."""
    config = transformers.BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=2)
    base = LanguageModel(transformers.BloomForCausalLM(config).to(dtype), tiny_tokenizer(V))
    views = [base, base.with_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))]
    prompts, index = torch.tensor([[1, 2, 5], [4, PAD, PAD]]), torch.tensor([0, 1])
    for view in views if first == "base" else views[::-1]:
        steps = decoder(view, prompts, index)
        steps.step(torch.tensor([3, 2]))
        expected = torch.stack([Plain(view).logits(p, ()) for p in ((1, 2, 5, 3), (4, 2))])
        assert (steps.logits - expected).abs().max() < (1e-9 if dtype == torch.float64 else 1e-5)
