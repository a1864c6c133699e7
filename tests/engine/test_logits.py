"""Logits over large vocabularies: only where they are wanted, in chunks, and the same numbers and gradients."""

from __future__ import annotations

from contextlib import contextmanager

import pyro
import pytest
import torch
import transformers
from packing import packing
from peft import LoraConfig
from pyro.ops.provenance import get_provenance, track_provenance
from tiny import tiny_lm, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmppl import LanguageModel, text
from lmppl.distributions import Completion, NextToken
from lmppl.distributions.rules import Selection, selected_log_softmax
from lmppl.engine import reading, unembedding
from lmppl.engine.tuning import TUNING
from lmppl.inference import SMC, Enumeration, Importance

pytestmark = pytest.mark.usefixtures("double_precision")

V = 4096
BUDGET = 2**18


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that any operation gives back, backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= x.numel():  # not a mere expansion
                self.numel = max(self.numel, x.numel())
        return out


@contextmanager
def split(always: bool, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as m:
        m.setattr(TUNING, "many_logits", 0 if always else 10**12)
        m.setattr(TUNING, "logits_at_once", BUDGET)
        m.setattr(TUNING, "unembedded", BUDGET)
        yield


def large(kind: str) -> LanguageModel:
    """A network of width 16 with 4,096 tokens."""
    common = {"vocab_size": V, "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 0, "bos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(**common, n_embd=16)
    else:
        more = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "pad_token_id": None,
        }
        config = transformers.Gemma2Config(**common, **more, final_logit_softcapping=2.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        with torch.no_grad():
            model.get_output_embeddings().weight.normal_(std=0.5)
    return LanguageModel(model, tiny_tokenizer(8))


def adapted(lm: LanguageModel, head: bool = True) -> LanguageModel:
    name = next(n for n, m in lm.model.named_modules() if m is lm.model.get_output_embeddings())
    targets = ["c_attn" if "gpt2" in lm.model.config.model_type else "q_proj", *([name] if head else [])]
    return lm.with_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # peft's, about merging
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "gpt2 adapter", "gemma2", "gemma2 adapter"])
def test_chunks_of_logits_give_the_same_scores_and_gradients_in_bounded_memory(kind, packed, monkeypatch):
    """12 rows of 19 tokens have 933,888 logits; no tensor has more than 262,144 elements."""
    lm = large(kind.split()[0])
    lm = adapted(lm) if "adapter" in kind else lm
    g = torch.Generator().manual_seed(0)
    prompt, z = torch.randint(1, V, (5,), generator=g), torch.randint(1, V, (12, 19), generator=g)
    prompt = text.cat(prompt, text.prefixes(prompt[:3], stop=0)[:, None]) if packed else prompt  # (3, 1, L)
    z = text.cat(z.masked_fill(torch.arange(19) >= torch.arange(8, 20)[:, None], text.PAD), torch.tensor([0]))
    z = z[::3] if packed else z
    unembedding.splits(lm), reading.supports_trees(lm)
    found = {}
    for always in (True, False):
        with split(always, monkeypatch), packing(packed), Largest() as largest:
            log_probs = Completion(lm, prompt, max_tokens=19).prefix_log_probs(z)
            finite = log_probs[log_probs > -torch.inf]
            grads = torch.autograd.grad(finite.mean(), lm.trainable_parameters(), allow_unused=True)
        found[always] = log_probs, [g for g in grads if g is not None], largest.numel
    assert torch.equal(found[True][0] > -torch.inf, found[False][0] > -torch.inf)
    assert (found[True][0] - found[False][0]).nan_to_num().abs().max() < 1e-9
    assert len(found[True][1]) == len(found[False][1]) > 0
    for a, b in zip(found[True][1], found[False][1], strict=True):
        assert (a - b).abs().max() <= 1e-9 * (1 + b.abs().max())
    assert found[True][2] <= BUDGET < 12 * 19 * V <= found[False][2]


def test_without_gradient_the_bound_is_the_same(monkeypatch):
    lm = large("gpt2")
    z = text.cat(torch.randint(1, V, (32, 11)), torch.tensor([0]))
    d = Completion(lm, torch.tensor([3, 4]), max_tokens=11)
    with torch.no_grad(), split(True, monkeypatch), Largest() as largest:
        chunked = d.log_prob(z)
    assert largest.numel <= BUDGET
    with torch.no_grad(), split(False, monkeypatch), Largest() as largest:
        assert (d.log_prob(z) - chunked).abs().max() < 1e-9
    assert largest.numel >= 32 * 11 * V


def test_what_keeps_the_whole_vocabulary_is_chunked_too(monkeypatch):
    lm, contexts = large("gpt2"), torch.randint(1, V, (200, 3))
    for always in (True, False):
        with split(always, monkeypatch):
            log_probs = NextToken(lm, contexts).logits
            grad = torch.autograd.grad(log_probs[:, 5].sum(), lm.trainable_parameters()[0])[0]
        if always:
            first = log_probs, grad
    assert (first[0] - log_probs).abs().max() < 1e-9
    assert (first[1] - grad).abs().max() < 1e-9 * (1 + grad.abs().max())


def test_the_head_runs_only_where_a_token_is_predicted(monkeypatch):
    """A prompt of 60 tokens, 20 texts of 2 tokens, two of them distinct: 2 positions of 1,240 need logits.

    Both texts begin alike, and the stop at the limit is certain."""
    lm, counts = large("gpt2"), []
    lm.model.lm_head.register_forward_hook(lambda module, args, out: counts.append(out.shape[:-1].numel()))
    z = torch.tensor([5, 7, 0]).repeat(20, 1)
    z[:10, 1] = 9
    with torch.no_grad(), split(True, monkeypatch), packing(False):
        unembedding.splits(lm)
        counts.clear()
        Completion(lm, torch.randint(1, V, (60,)), max_tokens=2).log_prob(z)
    assert max(counts) == 2


# Without logits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [{}, {"min_tokens": 3}, {"allowed": torch.arange(V) % 2 == 0}], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_a_frozen_output_layer_needs_no_logits_for_a_gradient(kind, rules, monkeypatch):
    """20 positions of V logits at a time are all that is there; Gemma 2, which caps its logits, has them all."""
    lm = adapted(large(kind), head=False)
    d = Completion(lm, torch.tensor([3, 4]), max_tokens=6, **rules)
    z, found = d.sample((9,)), []
    monkeypatch.setattr(TUNING, "many_logits", 0)
    monkeypatch.setattr(TUNING, "unembedded", 20 * V)
    unembedding.splits(lm), reading.supports_trees(lm), unembedding.plain_weight(lm)
    for direct in (True, False):
        with monkeypatch.context() as m, Largest() as largest:
            if not direct:
                m.setattr(Selection, "runs", None)
            scores = d.prefix_log_probs(z)
            weights = torch.linspace(0.5, 2.0, scores.shape[-1])
            loss = (scores * weights)[scores > -torch.inf].sum()
            found.append((scores, torch.autograd.grad(loss, lm.trainable_parameters()), largest.numel))
    (scores, gradients, most), (expected, expected_gradients, all_logits) = found
    assert torch.equal(scores > -torch.inf, expected > -torch.inf)
    assert (scores - expected).nan_to_num().abs().max() < 1e-9
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a - b).abs().max() <= 1e-9 * (1 + b.abs().max())
    assert (most == 20 * V < all_logits) == (kind == "gpt2")


def test_a_cap_that_only_large_logits_reach_is_noticed():
    """30 tanh(x / 30) is x up to rounding where logits are small, as those of random states are."""
    lm = large("gemma2")
    lm.model.config.final_logit_softcapping = 30.0
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(0.01)
    assert unembedding.plain_weight(adapted(lm, head=False)) is None
    lm.model.config.final_logit_softcapping = None
    lm.network.facts.pop("plain_head")
    assert unembedding.plain_weight(adapted(lm, head=False)) is not None


@pytest.mark.parametrize("many_logits", [0, 2**40])
def test_a_second_derivative_is_refused(many_logits, monkeypatch):
    monkeypatch.setattr(TUNING, "many_logits", many_logits)
    lm = tiny_lm("llama")
    lm.model.set_attn_implementation("eager")
    view = adapted(lm, head=False)
    log_prob = Completion(view, torch.tensor([3, 4]), max_tokens=3).log_prob(torch.tensor([2, 3, 0]))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(log_prob, view.trainable_parameters(), create_graph=True)


# Selective log-softmax ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forbidden", [False, True])
def test_selected_log_softmax_is_log_softmax_and_its_derivative(forbidden):
    g = torch.Generator().manual_seed(0)
    logits = 30 + 5 * torch.randn(3, 4, 9, generator=g, dtype=torch.double)
    index = torch.randint(9, (3, 4, 2), generator=g)
    if forbidden:
        logits[torch.rand(logits.shape, generator=g) < 0.3] = -torch.inf
        logits[..., 0] = 1.0
        index[..., 1] = 0
    logits.requires_grad_()
    weight = torch.randn(index.shape, generator=g, dtype=torch.double)
    found, expected = selected_log_softmax(logits, index), logits.log_softmax(-1).gather(-1, index)
    torch.testing.assert_close(found, expected)
    weight = weight.where(expected > -torch.inf, 0.0)
    kept = [x.where(x > -torch.inf, 0.0) for x in (found, expected)]
    ours, theirs = (torch.autograd.grad((x * weight).sum(), logits)[0] for x in kept)
    torch.testing.assert_close(ours, theirs)


def test_selected_log_softmax_holds_one_tensor_of_that_size():
    """Its own, so that the logits may go."""
    logits = torch.randn(50, 1000, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selected_log_softmax(logits, torch.zeros(50, 1, dtype=torch.long))
    (held,) = [x for x in kept if x.numel() == logits.numel()]
    assert held.data_ptr() != logits.data_ptr()


def test_provenance_passes_through():
    """Pyro's TraceGraph_ELBO follows which sample sites a log-probability depends on."""
    index = track_provenance(torch.zeros(2, 1, dtype=torch.long), frozenset({"z"}))
    assert get_provenance(selected_log_softmax(torch.randn(2, 3), index)) == {"z"}


# Half precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", [Importance, SMC])
def test_weights_of_a_half_precision_network_are_single(algorithm, dtype):
    """The mean of 20 estimates of the evidence is the enumerated one, within 5 standard errors and 32 roundings."""
    lm = tiny_lm("llama", vocab=5, dtype=dtype)

    def model():
        z = pyro.sample("z", Completion(lm, torch.tensor([2]), max_tokens=2))
        pyro.sample("y", Completion(lm, lm.join(z, "a"), max_tokens=2), obs=torch.tensor([3, 0]))

    exact = Enumeration(model).run().log_evidence.exp().item()
    runs = [algorithm(model, num_particles=128).run() for _ in range(20)]
    for posterior in runs:
        assert posterior.log_weights.dtype == posterior.log_evidence.dtype == torch.float32
        assert posterior.log_weights.logsumexp(0).item() == pytest.approx(posterior.log_evidence.item(), abs=1e-9)
    evidence = torch.stack([posterior.log_evidence for posterior in runs]).double().exp()
    error = evidence.std().item() / 20**0.5
    assert abs(evidence.mean().item() - exact) < 5 * error + 32 * torch.finfo(dtype).eps * exact
