"""Train an embedded language model from scratch: `python -m worlds.build stories --seed 0 --out DIR`."""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lmppl.files import claim, writing

from . import WORLDS, World, tokenizer

FILES = "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"


def fresh(world: World, words: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained GPT-2, Llama or BERT of the world's size, without dropout."""
    if world.masks is not None:
        return BertForMaskedLM(
            BertConfig(
                vocab_size=len(words),
                max_position_embeddings=world.context,
                hidden_size=world.width,
                intermediate_size=4 * world.width,
                num_hidden_layers=world.layers,
                num_attention_heads=world.heads,
                initializer_range=world.scale,
                hidden_act="gelu_pytorch_tanh",
                type_vocab_size=1,
                pad_token_id=words.pad_token_id,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
    if world.rotary:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                max_position_embeddings=world.context,
                hidden_size=world.width,
                intermediate_size=2 * world.width,
                num_hidden_layers=world.layers,
                num_attention_heads=world.heads,
                initializer_range=world.scale,
                tie_word_embeddings=True,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(words),
            n_positions=world.context,
            n_embd=world.width,
            n_layer=world.layers,
            n_head=world.heads,
            initializer_range=world.scale,
            activation_function="gelu_pytorch_tanh",  # "gelu_new" in one kernel
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def train(world: World, seed: int, log=print) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Next-token or masked-token training on an endless corpus: AdamW, warm-up, cosine decay to zero, clipping at 1.

    One thread, and a random state of its own: the same seed gives the same weights.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            words = tokenizer.build(world.words, world.context, world.word, mask=world.masks is not None)
            model = fresh(world, words).train()
            stream = world.rows(Random(seed), words.encode, world.context)
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=world.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: min((step + 1) / world.warmup, 0.5 + 0.5 * math.cos(math.pi * step / world.steps)),
            )
            started, mean = time.monotonic(), None
            for step in range(1, world.steps + 1):
                batch = torch.tensor([next(stream) for _ in range(world.rows_a_step)])  # (row, token)
                loss = _next_token(model, batch) if world.masks is None else _masked(model, words, world.masks, batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
                if step % 50 == 0 or step == world.steps:
                    log(f"step {step}/{world.steps}  loss {mean:.4f}  {time.monotonic() - started:.0f} s")
    finally:
        torch.set_num_threads(threads)
    return model.eval(), words


def _next_token(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _masked(
    model: PreTrainedModel, words: PreTrainedTokenizerFast, masks: Callable[..., torch.Tensor], batch: torch.Tensor
) -> torch.Tensor:
    r"""The mean over rows of the mean over masked words w of -log p(w), p a softmax over all tokens but the mask.

    Where k of n words are masked, k evenly from 1..n, n times that is on average -log p(path) of a random order.
    """
    masked = masks(batch, words)  # (row, token)
    ids = batch.masked_fill(masked, words.mask_token_id)
    logits = model(ids, attention_mask=(batch != words.eos_token_id).long()).logits
    logits = logits.index_fill(2, torch.tensor([words.mask_token_id]), -torch.inf)
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch, reduction="none")
    return ((loss * masked).sum(1) / masked.sum(1)).mean()


def refuse_to_replace(out: Path) -> None:
    """Raise ValueError where `out` is neither free, empty nor a checkpoint."""
    free = not out.exists() or (out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir())))
    if not free:
        raise ValueError(f"out={str(out)!r} holds something that is no checkpoint: name another directory")
    claim(out, FILES)


def save(model: PreTrainedModel, words: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a Hugging Face checkpoint, whole or not at all; one of its own at `out` is replaced.

    Raises ValueError where `out` holds anything else.
    """
    refuse_to_replace(out)
    with writing(out, "language model") as fresh:
        model.save_pretrained(fresh)
        words.save_pretrained(fresh)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m worlds.build", description=__doc__)
    parser.add_argument("name", choices=WORLDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--steps", type=int, help="instead of the world's own")
    parser.add_argument(
        "--check", type=int, default=16, metavar="N", help="measure the gates on N test observations (16)"
    )
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: expected at least 1")
    try:
        refuse_to_replace(options.out)
    except ValueError as error:
        parser.error(str(error))
    world = WORLDS[options.name]
    if options.steps is not None:
        world = world._replace(steps=options.steps)

    def progress(line: str) -> None:
        print(f"\r{line}   ", end="", file=sys.stderr, flush=True)

    model, words = train(world, options.seed, progress)
    print(file=sys.stderr)
    save(model, words, options.out)
    print(f"wrote {options.out}")
    if options.check > 0:
        print(world.report(model, words, options.check))


if __name__ == "__main__":
    main()
