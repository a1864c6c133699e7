"""Speed of sampling with log-probabilities, and of SMC with a token mask, beside Hugging Face's ``generate``.

    python -m benchmarks.sampling --out sampling.json

All three write exactly ``--tokens`` new tokens from one prompt, in one process, on one thread, repetitions interleaved;
``generate``, of the network as transformers makes it, samples with its KV cache and returns no probabilities.  The SMC
proposes from a mask that keeps a quarter of the vocabulary and weighs by the mass it keeps, resampling below an
effective sample size of N/2.  A ratio above 1 is faster than ``generate``; each repetition gives one, and the table
shows their median and range.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import Mock, patch

import pyro
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference.core.resampling import SCHEMES, systematic
from lmppl.inference.samplers.smc.smc import SMC

REQUIRED = {"sampling": 1.1, "SMC": 1.0}
LONG, REQUIRED_AFTER_LONG = 100, 1.3  # tokens of a prompt, and what is required after it


def network(width: int, vocab: int, activation: str = "gelu_new") -> Any:
    """A randomly initialised GPT-2 of four layers, its weights so large that tokens differ much in probability.

    The same one each time, as transformers makes it.
    """
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab,
        n_embd=width,
        n_layer=4,
        n_head=width // 32,
        n_positions=256,
        activation_function=activation,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=3 / width**0.5,  # logits of standard deviation 3
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def language_model(width: int, vocab: int, activation: str = "gelu_new") -> LanguageModel:
    """`network` as a language model whose tokens are w0, w1, ..."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    return LanguageModel(network(width, vocab, activation), tokenizer)


def contestants(
    lm: LanguageModel, plain: Any, prompt: torch.Tensor, particles: int, tokens: int
) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; ``generate`` of the same network, ``plain``, is what the others are measured against."""
    mask = torch.arange(lm.vocab_size) % 4 == 0  # a quarter is allowed, the stop among it
    exactly = {"max_tokens": tokens, "min_tokens": tokens}
    text = Completion(lm, prompt, **exactly)
    ids = prompt[None].expand(particles, -1)
    attend = torch.ones_like(ids)

    def generate() -> Any:
        with torch.inference_mode():
            return plain.generate(
                ids,
                attention_mask=attend,
                do_sample=True,
                top_k=0,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                use_cache=True,
            )

    def model() -> None:
        pyro.sample("z", Completion(lm, prompt, **exactly))

    def guide() -> None:
        pyro.sample("z", Completion(lm, prompt, allowed=mask, **exactly))

    smc = SMC(model, guide, particles, ess_threshold=0.5, max_plate_nesting=0)
    return {
        "generate": generate,
        "sampling": lambda: text.sample_and_log_prob((particles,)),
        "SMC": smc.run,
    }


def resamplings(run: Callable[[], Any]) -> int:
    """How many times a run resamples, each time reordering its KV cache."""
    counted = Mock(side_effect=systematic)
    with patch.dict(SCHEMES, systematic=counted):
        run()
    return counted.call_count


def timed(runs: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Processor seconds of every run of each contestant; they take turns, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repetition:  # the first is a warm-up
                seconds[name].append(time.process_time() - start)
    return seconds


def main(
    out: Annotated[Path | None, typer.Option(help="Write the measurements to this JSON file.")] = None,
    vocab: Annotated[int, typer.Option(help="Vocabulary of the models.")] = 2048,
    tokens: Annotated[int, typer.Option(help="New tokens of every text.")] = 24,
    repetitions: Annotated[int, typer.Option(help="Timed repetitions of each cell.")] = 9,
    width: Annotated[list[int] | None, typer.Option(help="Widths of the models.")] = None,
    particles: Annotated[list[int] | None, typer.Option(help="Numbers of texts at a time.")] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="Lengths of the prompt.")] = None,
) -> None:
    """Time all cells and print the ratios; exit with 1 where a requirement is missed."""
    torch.set_num_threads(1)
    console = Console(width=110)
    table = Table(title=f"speed relative to generate: median (range) of {repetitions}; vocabulary {vocab}")
    for column in ("width", "prompt", "particles", "generate [s]", *REQUIRED, "resamplings"):
        table.add_column(column, justify="right")
    rows = []
    for d in width or [64, 256]:
        lm, plain = language_model(d, vocab), network(d, vocab)
        for length in prompt or [6, 100]:
            start = torch.randint(1, vocab, (length,))
            for n in particles or [32, 128]:
                runs = contestants(lm, plain, start, n, tokens)
                seconds, reordered = timed(runs, repetitions), resamplings(runs["SMC"])
                base = seconds["generate"]
                ratios = {k: [b / s for b, s in zip(base, seconds[k], strict=True)] for k in REQUIRED}
                cell = {"width": d, "prompt": length, "particles": n, "resamplings": reordered}
                rows.append({**cell, "seconds": seconds, "ratios": ratios})
                cells = [f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in ratios.values()]
                table.add_row(str(d), str(length), str(n), f"{statistics.median(base):.3f}", *cells, str(reordered))
    console.print(table)
    if out is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        out.write_text(json.dumps({"vocab": vocab, "tokens": tokens, **versions, "cells": rows}, indent=1))
    slow = [(r["width"], r["prompt"], r["particles"], k) for r in rows for k, least in REQUIRED.items()
            if statistics.median(r["ratios"][k]) < (REQUIRED_AFTER_LONG if r["prompt"] >= LONG else least)]  # fmt: skip
    if slow:
        console.print(f"slower than required: {slow}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
