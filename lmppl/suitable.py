"""Whether a network can be a causal language model; one that cannot is refused when it is wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def refuse_unloaded(model: Any) -> None:
    """Raises ValueError for a module that holds no weights of its own, or rounds a text by the others of its batch."""
    if not isinstance(model, nn.Module):
        return
    if hasattr(model, "_orig_mod"):
        raise ValueError("model: it is a wrapper made by torch.compile; pass the model itself, after model.compile()")
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise ValueError(
                f"model: {name} is quantised by torch.ao, which rounds a text by the others of its batch; pass the "
                "model before quantisation"
            )
        if hasattr(module, "_hf_hook"):  # accelerate brings the weights when they are needed
            continue
        for key, weight in (*module._parameters.items(), *module._buffers.items()):
            if weight is not None and weight.is_meta:
                raise ValueError(
                    f"model: {name}.{key} has no values (it is on the meta device); load the weights by from_pretrained"
                )


def refuse_other_predictions(
    model: Any, vocab_size: int, max_length: int | None, read: Callable[[Tensor], Any]
) -> None:
    """Raises ValueError if the network does not predict each next token from the tokens before it alone.

    ``read`` returns its output for token ids (B, L). Two texts are read that differ in their last token.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: {name} has an encoder beside its decoder; a causal language model is expected, such as those that "
            "AutoModelForCausalLM loads"
        )
    if getattr(model.config, "return_dict", True) is False:
        raise ValueError("model: its configuration has return_dict=False; set model.config.return_dict = True")
    length = min(5, max_length or 5)
    if vocab_size < 2 or length < 2:
        return
    for seed in (0, 1):  # experts may be chosen differently by rounding; not twice
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (1, length), generator=generator, device="cpu").repeat(2, 1)
        ids[1, -1] = (ids[1, -1] + 1) % vocab_size
        try:
            output = read(ids)
        except Exception:  # kernels of another device raise anything; the model may be moved there before its first use
            return
        logits = getattr(output, "logits", None)
        if logits is None or tuple(logits.shape) != (*ids.shape, vocab_size):
            found = f"logits {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
            raise ValueError(
                f"model: {name} returns {found}, and logits {(*ids.shape, vocab_size)} are expected: it has no "
                "language-model head"
            )
        if _is_causal(logits):
            return
    raise ValueError(
        f"model: {name} reads the tokens that it predicts: it is no causal language model. A masked one is for "
        "MaskedLanguageModel; a decoder in the manner of BERT needs is_decoder=True in its configuration"
    )


def _is_causal(logits: Tensor) -> bool:
    """Returns whether the predictions (2, L, V) of two texts differ at the last position only, up to rounding."""
    change = (logits[0] - logits[1])[:-1].abs().max()
    rounding = torch.finfo(logits.dtype).eps * (100 if logits.dtype in (torch.float32, torch.float64) else 8)
    return not bool(change > rounding * logits.abs().max())  # NaN says nothing
