"""Adapters on one base: each its own weights, gradients and requires_grad."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig
from tiny import ARCHITECTURES, tiny_lm
from transformers.modeling_layers import GradientCheckpointingLayer

from lmppl import LanguageModel
from lmppl.adapters import CheckpointError

pytestmark = pytest.mark.usefixtures("double_precision")

IDS = torch.tensor([[2, 3, 4, 5], [5, 2, 0, 6]])
LORA = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)


@pytest.fixture(params=ARCHITECTURES)
def lm(request) -> LanguageModel:
    return tiny_lm(request.param)


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm(IDS).logits


def adapted(lm: LanguageModel, seed: int, config: peft.PeftConfig = LORA) -> LanguageModel:
    """A view whose adapter is far from zero."""
    view = lm.with_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    for p in view.trainable_parameters():
        p.data.normal_(std=0.3, generator=generator)
    return view


def alone(arch: str, seed: int) -> LanguageModel:
    """The same base with this adapter and no other."""
    return adapted(tiny_lm(arch), seed)


def test_a_new_adapter_starts_at_the_base(lm):
    base = logits(lm)
    assert torch.equal(logits(lm.with_adapter(LORA)), base)


def test_each_view_computes_as_if_it_were_alone(lm):
    arch = ARCHITECTURES[[type(tiny_lm(a).model) for a in ARCHITECTURES].index(type(lm.model))]
    base, views = logits(lm), [adapted(lm, seed) for seed in (1, 2)]
    assert not torch.equal(logits(views[0]), base)
    for _ in range(2):
        for seed, view in zip((1, 2), views, strict=True):
            torch.testing.assert_close(logits(view), logits(alone(arch, seed)), rtol=0, atol=0)
            assert torch.equal(logits(lm), base)


def test_views_own_disjoint_parameters_and_the_base_keeps_its_own(lm):
    before = {name: p.requires_grad for name, p in lm.model.named_parameters()}
    base = lm.trainable_parameters()
    assert len(base) == len(before)
    views = [lm.with_adapter(LORA), lm.with_adapter(LORA, name="second")]
    owners = [{id(p) for p in v.trainable_parameters()} for v in (lm, *views)]
    assert all(owners) and sum(map(len, owners)) == len(set.union(*owners)) == len(list(lm.model.parameters()))
    assert {id(p) for p in base} == owners[0]
    for view in (*views, lm, views[0]):
        view(IDS).logits.sum().backward()
        assert all(p.requires_grad for p in lm.model.parameters())


def test_frozen_base_parameters_stay_frozen(lm):
    lm.model.requires_grad_(False)
    view = lm.with_adapter(LORA)
    view(IDS).logits.sum().backward()
    assert lm.trainable_parameters() == [] and not any(p.requires_grad for p in lm.network.base_parameters)
    assert all(p.grad is not None for p in view.trainable_parameters())


def test_a_views_backward_reaches_that_view_alone(lm):
    views = [lm, adapted(lm, 1), adapted(lm, 2)]
    for view in views:
        view(IDS).logits.square().sum().backward()
        for other in views:
            reached = [p.grad is not None for p in other.trainable_parameters()]
            assert all(reached) if other is view else not any(reached)
        lm.model.zero_grad()


def loss(*views: LanguageModel) -> torch.Tensor:
    outputs = [view(IDS).logits.log_softmax(-1) for view in views]
    return torch.stack([o * (i + 1) for i, o in enumerate(outputs)]).sum(0).square().mean()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_joint_backward_through_two_adapters_and_the_base_is_right(arch):
    """Against the same three networks without anything shared between them."""
    lm = tiny_lm(arch, dtype=torch.float64)
    shared = [adapted(lm, 1), adapted(lm, 2), lm]
    separate = [copy.deepcopy(view) for view in shared]
    loss(*shared).backward()
    loss(*separate).backward()
    for one, other in zip(shared, separate, strict=True):
        for p, q in zip(one.trainable_parameters(), other.trainable_parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            torch.testing.assert_close(p.grad, q.grad)


def test_the_gradient_is_the_derivative():
    """Central differences along a random direction in the weights of one adapter, another having run since."""
    lm = tiny_lm(dtype=torch.float64)
    a, b = adapted(lm, 1), adapted(lm, 2)
    value = loss(a, b)
    logits(lm)
    value.backward()
    weights = a.trainable_parameters()
    direction = [torch.randn_like(p) for p in weights]
    slope = sum((p.grad * d).sum() for p, d in zip(weights, direction, strict=True))
    ends = []
    for step in (1e-5, -2e-5):
        for p, d in zip(weights, direction, strict=True):
            p.data.add_(d, alpha=step)
        ends.append(loss(a, b).item())
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope.item(), rel=1e-5)


def test_training_one_adapter_leaves_all_else_bitwise_alone(lm):
    a, b = adapted(lm, 1), adapted(lm, 2)
    before = [logits(v) for v in (lm, b)]
    start = logits(a)
    optimizer = torch.optim.AdamW(a.trainable_parameters(), lr=0.1)
    for _ in range(3):
        loss(b, a, lm).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(logits(a), start)
    assert all(torch.equal(logits(v), old) for v, old in zip((lm, b), before, strict=True))


def test_training_the_base_moves_every_view():
    lm = tiny_lm()
    view = adapted(lm, 1)
    start = logits(view)
    lm.trainable_parameters()[0].data.add_(1.0)
    assert not torch.equal(logits(view), start)


def test_dropout_of_an_adapter_is_off(lm):
    view = adapted(lm, 1)
    view.train()
    assert torch.equal(logits(view), logits(view))
    assert torch.equal(view(IDS).logits, logits(view))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_adapters_of_different_kinds_live_together(order, tmp_path):
    lm = tiny_lm("llama")
    configs = [LORA, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])]
    views = [adapted(lm, k, configs[k]) for k in order]
    single = [adapted(tiny_lm("llama"), k, configs[k]) for k in order]
    for view, one in zip(views, single, strict=True):
        torch.testing.assert_close(logits(view), logits(one))
        view.save_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(logits(lm.with_adapter(tmp_path / "adapter")), logits(one))
        plain = peft.PeftModel.from_pretrained(tiny_lm("llama").model, tmp_path / "adapter").eval()
        torch.testing.assert_close(plain(IDS).logits, logits(one))
    lm.save_pretrained(tmp_path / "lm")
    assert torch.equal(logits(LanguageModel.from_pretrained(tmp_path / "lm")), logits(lm))


@pytest.mark.parametrize("kind", [peft.GloraConfig, peft.OSFConfig])
def test_all_linear_needs_no_setting_of_modules_that_are_left_out(kind, tmp_path):
    assert not hasattr(kind(), "exclude_modules")
    lm = tiny_lm("llama")
    view = adapted(lm, 1, kind(target_modules="all-linear"))
    assert not torch.equal(logits(view), logits(lm)) and torch.equal(logits(lm), logits(tiny_lm("llama")))
    view.save_pretrained(tmp_path)
    assert torch.equal(logits(lm.with_adapter(tmp_path)), logits(view))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft alone, on GPT-2
def test_an_adapter_is_saved_for_peft_and_loads_back(lm, tmp_path):
    adapted(lm, 1)
    view = adapted(lm, 2)
    lm.save_pretrained(tmp_path / "lm")
    view.save_pretrained(tmp_path / "adapter")
    files = {"adapter_config.json", "adapter_model.safetensors", "lmppl.json"}
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == files
    again = view.with_adapter(tmp_path / "adapter", name="again")  # from a view: a sibling, not an adapter on it
    assert torch.equal(logits(again), logits(view))
    assert len(again.trainable_parameters()) == len(view.trainable_parameters())
    base = LanguageModel.from_pretrained(tmp_path / "lm").model
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(IDS).logits, logits(view))  # peft adds up in another order


def test_modules_to_save_belong_to_the_adapter(tmp_path):
    lm = tiny_lm("llama")
    base = logits(lm)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    a, b = adapted(lm, 1, config), adapted(lm, 2, config)
    assert torch.equal(logits(lm), base) and not torch.equal(logits(a), logits(b))
    a.save_pretrained(tmp_path / "a")
    assert torch.equal(logits(lm.with_adapter(tmp_path / "a")), logits(a))
    assert len(lm.trainable_parameters()) == len(tiny_lm("llama").trainable_parameters())


def test_a_copy_is_independent_and_whole():
    lm = tiny_lm()
    a, b = adapted(lm, 1), adapted(lm, 2)
    logits(b)
    twin = copy.deepcopy(a)
    before = logits(a)
    assert torch.equal(logits(twin), before)
    for p in twin.trainable_parameters():
        p.data.add_(1.0)
    assert torch.equal(logits(a), before) and not torch.equal(logits(twin), before)
    assert twin.network is not a.network


def test_gradient_checkpointing_computes_again_with_the_view_that_ran(lm):
    """Two adapters and the base between forward and backward, which runs twice: the gradients without checkpointing."""
    views = [adapted(lm, 1), adapted(lm, 2), lm]
    calls: list[int] = []
    last = [m for m in lm.network.checkpointing if isinstance(m, GradientCheckpointingLayer)][-1]
    next(last.children()).register_forward_hook(lambda *_: calls.append(1))
    grads = {}
    for on in (False, True):
        (lm.model.activation_checkpointing_enable if on else lm.model.activation_checkpointing_disable)()
        value = loss(*views)
        logits(views[1])
        calls.clear()
        for _ in range(2):
            lm.model.zero_grad()
            value.backward(retain_graph=True)
            logits(views[0])
        grads[on] = [p.grad for view in views for p in view.trainable_parameters()]
        assert len(calls) == 2 * (3 * on + 1)  # each layer again for each view; once for each call of logits
        assert all(p.requires_grad for view in views for p in view.trainable_parameters())
    assert len(grads[True]) == len(grads[False])
    for a, b in zip(grads[True], grads[False], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_pass_with_a_cache_cannot_be_computed_again():
    lm = tiny_lm("llama")
    lm.model.activation_checkpointing_enable()
    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        lm(IDS, use_cache=True)
    with torch.no_grad():
        assert lm(IDS, use_cache=True).past_key_values is not None
    assert lm(IDS).past_key_values is None


def test_checkpointing_is_refused_where_no_layer_can_be_computed_again():
    lm = tiny_lm("llama")
    view = lm.with_adapter(LORA)
    lm.model.model.gradient_checkpointing = True  # as in a model whose layers transformers does not know
    for either in (lm, view):
        with pytest.raises(RuntimeError, match="gradient checkpointing"):
            either(IDS)
    logits(view)


def test_names_are_unique():
    lm = tiny_lm()
    views = [lm.with_adapter(LORA, name="guide"), lm.with_adapter(LORA)]
    views.append(views[1].with_adapter(LORA))
    assert len(lm.network.adapters) == 3
    for bad in ("guide", "", "a.b", "transformer"):
        with pytest.raises(ValueError, match="name="):
            lm.with_adapter(LORA, name=bad)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["nowhere"]),
        LoraConfig(target_modules=["ln_1"]),
        LoraConfig(target_modules=["c_attn", "ln_1"]),
        LoraConfig(target_modules="all-linear", bias="all"),
        LoraConfig(target_modules="all-linear", init_lora_weights="pissa"),
        LoraConfig(target_modules="all-linear", alora_invocation_tokens=[2], task_type="CAUSAL_LM"),
        LoraConfig(target_modules="all-linear", layer_replication=[[0, 2], [1, 2]]),
        peft.PolyConfig(target_modules=["c_attn"], n_skills=2, n_tasks=2),
        peft.LilyConfig(target_modules=["c_attn"]),
        {"r": 2},
    ],
)
def test_a_config_that_does_not_fit_changes_nothing(config):
    lm = tiny_lm()
    view = adapted(lm, 1)
    before, mine = (logits(lm), logits(view)), view.trainable_parameters()
    with pytest.raises(ValueError, match="peft_config"):
        lm.with_adapter(config)
    assert torch.equal(logits(lm), before[0]) and torch.equal(logits(view), before[1])
    assert all(p.requires_grad for v in (lm, view) for p in v.network.base_parameters)
    assert view.trainable_parameters() == mine


def test_the_config_given_is_not_written_to():
    config = LoraConfig(r=2, target_modules="all-linear")
    tiny_lm().with_adapter(config)
    assert config.target_modules == "all-linear"


def test_a_path_without_a_fitting_adapter(tmp_path):
    lm = tiny_lm("gpt2")
    (tmp_path / "empty").mkdir()
    tiny_lm("llama").with_adapter(LORA).save_pretrained(tmp_path / "llama")
    tiny_lm("gpt2").with_adapter(LORA).save_pretrained(tmp_path / "torn")
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    adapted(tiny_lm("gpt2", vocab=12), 0, LoraConfig(r=2, target_modules=["c_attn", "wte"])).save_pretrained(
        tmp_path / "wide"
    )
    base = logits(lm)
    for name in ("missing", "empty", "llama", "torn", "wide"):
        with pytest.raises(CheckpointError, match=name) as caught:
            lm.with_adapter(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert torch.equal(logits(lm), base) and not lm.network.adapters


def test_a_model_with_peft_layers_is_refused():
    model = peft.get_peft_model(tiny_lm().model, LoraConfig(target_modules="all-linear", fan_in_fan_out=True))
    model.base_model.model.__dict__.pop("_lmppl_network")
    with pytest.raises(ValueError, match="model already holds PEFT layers"):
        LanguageModel(model.base_model.model, tiny_lm().tokenizer)


# Removing -------------------------------------------------------------------------------------------------------------


def inventory(lm: LanguageModel) -> list[object]:
    """Every module, weight and buffer of the model, by name."""
    parts = [*lm.model.named_modules(), *lm.model.named_parameters(), *lm.model.named_buffers()]
    return [(name, id(part)) for name, part in parts]


CONFIGS = [
    LORA,
    LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    LoraConfig(r=2, target_modules=["down_proj", "embed_tokens"], modules_to_save=["lm_head"]),
    LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 3]),
    IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_an_adapter_that_nobody_holds_leaves_the_model_as_it_was(config):
    lm = tiny_lm("llama")
    before, base = inventory(lm), logits(lm)
    for _ in range(16 if config is LORA else 3):
        logits(lm.with_adapter(config))
    assert inventory(lm) == before and not lm.network.adapters
    kept, gone = adapted(lm, 1, config), adapted(lm, 2, config)
    expected, mine = logits(kept), [(p, p.requires_grad) for p in kept.trainable_parameters()]
    held = inventory(lm)
    lm.remove_adapter(gone)
    assert len(inventory(lm)) < len(held) and torch.equal(logits(kept), expected) and torch.equal(logits(lm), base)
    assert [(p, p.requires_grad) for p in kept.trainable_parameters()] == mine
    for use in (lambda: logits(gone), gone.trainable_parameters, gone.remove_adapter):
        with pytest.raises(ValueError, match="was removed"):
            use()
    kept.remove_adapter()
    assert inventory(lm) == before and torch.equal(logits(lm), base)
    assert all(p.requires_grad for p in lm.network.base_parameters)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_every_base_weight_is_saved_whatever_adapter_wraps_its_layer(config, tied, tmp_path):
    made = tiny_lm("llama", dtype=torch.float32)
    network = type(made.model)(copy.deepcopy(made.model.config))
    network.load_state_dict(made.model.state_dict())
    if tied:
        network.config.tie_word_embeddings = True
        network.lm_head.weight = network.model.embed_tokens.weight
    lm = LanguageModel(network, made.tokenizer)
    kept = adapted(lm, 1, config)
    lm.save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(lm)) and not torch.equal(logits(kept), logits(lm))


def test_adapters_are_removed_by_name_and_unknown_ones_are_refused():
    lm = tiny_lm()
    view = lm.with_adapter(LORA, name="guide")
    for wrong in ("other", lm, tiny_lm(seed=1).with_adapter(LORA), 3):
        with pytest.raises(ValueError, match="adapter: expected .*'guide'"):
            lm.remove_adapter(wrong)
    lm.remove_adapter("guide")
    again = lm.with_adapter(LORA, name="guide")
    assert again.has_adapter and list(lm.network.adapters) == ["guide"]
    del view  # whose name another has now
    assert list(lm.network.adapters) == ["guide"] and len(again.trainable_parameters()) > 0
    logits(again)


def test_a_view_that_is_dropped_while_the_network_is_in_use_is_removed_afterwards():
    lm = tiny_lm()
    before = inventory(lm)
    views = [lm.with_adapter(LORA)]
    with lm.network.lock:
        views.clear()
        assert len(inventory(lm)) > len(before)  # a pass may be under way
    assert inventory(lm) == before


def test_a_backward_pass_outlives_its_view():
    lm = tiny_lm("llama")
    lm.model.activation_checkpointing_enable()
    view = adapted(lm, 1)
    parameters = view.trainable_parameters()
    loss = view(IDS).logits.square().sum()
    loss.backward(retain_graph=True)
    expected = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    del view
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_a_load_that_fails_leaves_the_model_as_it_was(tmp_path):
    lm = tiny_lm("llama")
    good, bad = tmp_path / "good", tmp_path / "bad"
    lm.with_adapter(LORA, name="a").save_pretrained(good)
    lm.with_adapter(LoraConfig(r=4, target_modules="all-linear")).save_pretrained(bad)
    (bad / "lmppl.json").unlink()  # which would tell
    (bad / "adapter_config.json").write_bytes((good / "adapter_config.json").read_bytes())
    view = adapted(lm, 1)
    before, expected = inventory(lm), logits(view)
    for name in (None, "bad", None):
        with pytest.raises(CheckpointError, match="does not fit"):
            lm.with_adapter(bad, name=name)
        assert inventory(lm) == before and list(lm.network.adapters) == [*lm.network.adapters][:1]
    assert torch.equal(logits(view), expected)
    again = lm.with_adapter(good, name="bad")
    assert {p.shape for p in again.trainable_parameters()} == {p.shape for p in view.trainable_parameters()}


def test_a_copy_of_the_network_has_adapters_of_its_own():
    lm = tiny_lm()
    view = adapted(lm, 1)
    twin = copy.deepcopy(view)
    expected = logits(view)
    lm.remove_adapter(view)
    assert torch.equal(logits(twin), expected) and len(twin.network.adapters) == 1
    network, before = twin.network, len(list(tiny_lm().model.modules()))
    del twin
    assert not network.adapters and len(list(network.model.modules())) == before


def test_a_configuration_of_another_rank_than_the_weights_is_told_with_the_file_and_the_shapes(tmp_path):
    lm = tiny_lm()
    lm.with_adapter(LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    (tmp_path / "lmppl.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(CheckpointError, match=r"does not fit this model \(adapter_model.safetensors: .*size mismatch"):
        lm.with_adapter(tmp_path)
