"""The usual methods of decoding from a language model, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig

from .. import text
from ..constraints import Constraint
from ..distributions import Completion
from ..engine.decoding import rows_at_once
from ..engine.recomputing import decoder
from ..engine.scoring import with_bos
from ..language_model import LanguageModel


@torch.no_grad()
def generate(
    lm: LanguageModel, x: Tensor, n: int, *, max_tokens: int, stop: str | int = ".", **options: object
) -> Tensor:
    """``n`` continuations of each prompt by Hugging Face's `generate`, (n, B, max_tokens + 1), with their stops.

    It uses the base weights, without an adapter.  A method that gives one answer (greedy) is repeated.

    :param x: prompts, (B, L).
    :param options: those of a `GenerationConfig`, e.g. ``do_sample=True, top_p=0.9`` or ``num_beams=16``.
    """
    ends = lm.stop_ids(stop)
    single = not options.get("do_sample") and not options.get("num_beams")
    untouched = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} if options.get("do_sample") else {}
    config = GenerationConfig(
        max_new_tokens=max_tokens, eos_token_id=ends.tolist(), pad_token_id=ends[0].item(),
        num_return_sequences=1 if single else n,
        **untouched | options,
    )  # fmt: skip
    columns = []
    for row in with_bos(lm, x):
        prompt = row[row != text.PAD][None]  # (1, L)
        with lm.network.lock:
            lm.network.activate(None)
            out = lm.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        columns.append(ended(out[:, prompt.shape[1] :], ends, max_tokens).expand(n, -1))
    return torch.stack(columns, 1)


@torch.no_grad()
def beams(
    lm: LanguageModel,
    x: Tensor,
    n: int,
    *,
    max_tokens: int,
    stop: str | int = ".",
    groups: int = 1,
    penalty: float = 1.0,
    allowed: Tensor | None = None,
) -> Tensor:
    r"""Diverse beam search: ``n`` texts for each prompt, (n, B, max_tokens + 1), in ``groups`` of equally many beams.

    At every step a group chooses the continuations of its beams with the largest

    .. math:: \log p(z_{1..t} \mid x) - penalty \cdot \#\{\text{beams of earlier groups that chose } z_t \text{ now}\}

    so that one group is plain beam search.

    :param x: prompts, (B, L).
    :param allowed: (V,), the tokens that may be chosen; p is normalised over them.
    :raises ValueError: naming ``groups``, where it does not divide ``n``, or ``prompt``, where prompt and
        ``max_tokens`` do not fit into the model's context.

    Source: Vijayakumar et al. 2018, "Diverse beam search", with Hamming diversity.
    """
    if groups < 1 or n % groups:
        raise ValueError(f"groups: {groups} does not divide the {n} beams")
    Completion(lm, x, max_tokens=max_tokens, stop=stop)  # raises where the context is too short
    at_once = max(1, rows_at_once(lm, x, max_tokens) // n)
    if len(x) > at_once:
        parts = [
            beams(lm, some, n, max_tokens=max_tokens, stop=stop, groups=groups, penalty=penalty, allowed=allowed)
            for some in x.split(at_once)
        ]
        return torch.cat(parts, 1)
    ends, width, count = lm.stop_ids(stop), n // groups, len(x)
    z = torch.full((count, groups, width, max_tokens), text.PAD, device=x.device)
    log_p = torch.full((count, groups, width), -torch.inf, device=x.device)
    log_p[..., 0] = 0.0  # one empty text; the other beams are copies of it
    row = torch.arange(count * n, device=x.device)
    state, over = decoder(lm, x, row // n), torch.zeros_like(log_p, dtype=torch.bool)  # (B, G, K)
    for t in range(max_tokens):
        gain = state.logits.log_softmax(-1).view(*over.shape, -1)  # (B, G, K, V)
        if allowed is not None:
            gain = gain.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        stay = torch.full_like(gain, -torch.inf)
        stay[..., ends[0]] = 0.0  # a finished text is its own only continuation
        total = log_p[..., None] + torch.where(over[..., None], stay, gain)
        used = torch.zeros_like(total[:, 0, 0])  # (B, V)
        source = row.view(over.shape).clone()  # the row that each beam continues
        for g in range(groups):
            charged = total[:, g] - penalty * used[:, None].masked_fill(over[:, g, :, None], 0.0)
            chosen = charged.flatten(1).topk(width).indices  # (B, K)
            beam, token = chosen // gain.shape[-1], chosen % gain.shape[-1]
            log_p[:, g] = total[:, g].flatten(1).gather(1, chosen)
            old = over[:, g].gather(1, beam)
            source[:, g] = source[:, g].gather(1, beam)
            z[:, g] = z[:, g].gather(1, beam[..., None].expand(-1, -1, max_tokens))
            z[:, g, :, t] = torch.where(old, text.PAD, token)
            used.scatter_add_(1, token, (~old).to(used.dtype))
        over = torch.isin(z, ends).any(-1)
        if t + 1 == max_tokens or bool(over.all()):
            break
        state.select(source.flatten())
        last = z[..., t].flatten()
        state.step(last.where(last != text.PAD, ends[0]), alive=int((~over).sum()))
    return ended(z.flatten(1, 2).transpose(0, 1), ends, max_tokens)


def ended(z: Tensor, ends: Tensor | int, max_tokens: int) -> Tensor:
    """Texts (..., L) up to their first token of ``ends``, to which the first of ``ends`` is added where there is none:
    (..., max_tokens + 1).
    """
    ends = torch.as_tensor(ends, device=z.device).reshape(-1)
    z = text.pad(z[..., :max_tokens], max_tokens + 1)
    is_end = torch.isin(z, ends)
    z = z.masked_fill(is_end.int().cumsum(-1) > is_end.int(), text.PAD)
    missing = torch.where(is_end.any(-1), text.PAD, ends[0])
    return z.scatter(-1, text.length(z)[..., None], missing[..., None])


@torch.no_grad()
def log_likelihood(
    lm: LanguageModel,
    x: Tensor,
    z: Tensor,
    *,
    max_tokens: int,
    stop: str | int = ".",
    allowed: Constraint | None = None,
) -> Tensor:
    """log p(z | x) under ``lm``, whatever method drew z (n, B, E): (n, B)."""
    return Completion(lm, x, max_tokens=max_tokens, stop=stop, allowed=allowed).log_prob(z)
