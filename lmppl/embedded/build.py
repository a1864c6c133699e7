"""Train an embedded language model from scratch: `python -m lmppl.embedded.build stories --seed 0 --out DIR`."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..files import claim, writing
from . import arithmetic, corpus, gates, numbers, subjectivity, tokenizer
from .stories import stories

FILES = "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"


class Recipe(NamedTuple):
    """Everything that decides the weights besides the seed."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    scale: float = 0.02  # standard deviation of the initial weights
    context: int = 128  # tokens in a row, and the longest text that the model reads
    rows: int = 32
    steps: int = 3200
    learning_rate: float = 4e-3
    warmup: int = 100
    rotary: bool = False  # a Llama instead of a GPT-2


RECIPES = {
    "stories": Recipe(),
    "places": Recipe(heads=8, scale=0.08),  # not shipped: learns what a place offers, see docs/infilling.md
    "numbers": Recipe(width=48, context=32, rows=128, steps=1200),
    "subjectivity": Recipe(width=48, context=128, rows=16, steps=2400),
    "arithmetic": Recipe(layers=4, context=48, rows=64, steps=2200, learning_rate=3e-3, rotary=True),
}


class Source(NamedTuple):
    """What a language model reads, and how it is judged."""

    words: tuple[str, ...]
    rows: Callable[[Random, Callable[[str], list[int]], int], Iterator[list[int]]]
    report: Callable[[PreTrainedModel, PreTrainedTokenizerFast, int], object]
    word: str = tokenizer.WORD  # a regular expression


STORIES = Source(corpus.WORDS, corpus.rows, lambda lm, words, n: gates.report(lm, words, stories("test")[:n]))
SOURCES = {
    "stories": STORIES,
    "places": STORIES,
    "numbers": Source(numbers.WORDS, numbers.rows, numbers.report),
    "subjectivity": Source(subjectivity.WORDS, subjectivity.rows, subjectivity.report),
    "arithmetic": Source(arithmetic.WORDS, arithmetic.rows, arithmetic.report, arithmetic.WORD),
}


def fresh(recipe: Recipe, words: PreTrainedTokenizerFast) -> PreTrainedModel:
    """An untrained GPT-2 or Llama of the recipe's size, without dropout."""
    if recipe.rotary:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                max_position_embeddings=recipe.context,
                hidden_size=recipe.width,
                intermediate_size=2 * recipe.width,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                initializer_range=recipe.scale,
                tie_word_embeddings=True,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(words),
            n_positions=recipe.context,
            n_embd=recipe.width,
            n_layer=recipe.layers,
            n_head=recipe.heads,
            initializer_range=recipe.scale,
            activation_function="gelu_pytorch_tanh",  # "gelu_new" in one kernel
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def train(
    recipe: Recipe, seed: int, log=print, source: Source = STORIES
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Next-token training on an endless corpus: AdamW, warm-up, cosine decay to zero, clipping at 1.

    One thread, and a random state of its own: the same seed gives the same weights.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            words = tokenizer.build(source.words, recipe.context, source.word)
            model = fresh(recipe, words).train()
            stream = source.rows(Random(seed), words.encode, recipe.context)
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: min((step + 1) / recipe.warmup, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)),
            )
            started, mean = time.monotonic(), None
            for step in range(1, recipe.steps + 1):
                batch = torch.tensor([next(stream) for _ in range(recipe.rows)])  # (row, token)
                logits = model(batch).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
                if step % 50 == 0 or step == recipe.steps:
                    log(f"step {step}/{recipe.steps}  loss {mean:.4f}  {time.monotonic() - started:.0f} s")
    finally:
        torch.set_num_threads(threads)
    return model.eval(), words


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
    parser = argparse.ArgumentParser(prog="python -m lmppl.embedded.build", description=__doc__)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
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
    recipe = RECIPES[options.name]
    if options.steps is not None:
        recipe = recipe._replace(steps=options.steps)

    def progress(line: str) -> None:
        print(f"\r{line}   ", end="", file=sys.stderr, flush=True)

    model, words = train(recipe, options.seed, progress, SOURCES[options.name])
    print(file=sys.stderr)
    save(model, words, options.out)
    print(f"wrote {options.out}")
    if options.check > 0:
        print(SOURCES[options.name].report(model, words, options.check))


if __name__ == "__main__":
    main()
