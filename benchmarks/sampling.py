"""Speed of sampling with log-probabilities, and of SMC with a token mask, compared with Hugging Face's ``generate``.

    python -m benchmarks.sampling --out sampling.json
    python -m benchmarks.sampling --checkpoint PATH    # a pretrained network instead of random ones

All write exactly ``--tokens`` new tokens from one prompt, in one process, on one thread, in alternating repetitions.
``generate`` is that of transformers' own network; it samples with its KV cache and returns no probabilities.
*Sampling* is from the base network, *adapter* from a view with LoRA on it.  The SMC proposes from a mask that keeps a
quarter of the vocabulary and weighs by the mass it keeps, resampling below an effective sample size of N/2.  A ratio
above 1 is faster than ``generate``; each repetition gives one, and the table shows their median and range.  The *share
of peak* counts the matrices that all tokens of a text except the last must pass, two operations per number.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import Mock, patch

import pyro
import torch
import transformers
import typer
from tokenizers import Tokenizer, models

from benchmarks.measuring import (
    LORA,
    Checkpoint,
    Device,
    Dtype,
    Goal,
    InMarkdown,
    Matrices,
    Out,
    Place,
    faster,
    introduce,
    judge,
    save,
    show,
    spread,
)
from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference.core.resampling import SCHEMES, systematic
from lmppl.inference.samplers.smc.smc import SMC

OURS = "sampling", "adapter", "SMC"
REQUIRED = {"sampling": 1.1, "SMC": 1.0}
LONG, REQUIRED_AFTER_LONG = 100, 1.3  # tokens of a prompt, and what is required after it
PRETRAINED = {16: (1.3, 0.35), 64: (2.0, 0.55)}  # by rows: times as fast as generate, share of peak


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
    lm: LanguageModel, guide: LanguageModel, plain: Any, prompt: torch.Tensor, particles: int, tokens: int
) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; ``generate`` of the same network, ``plain``, is what the others are measured against."""
    mask = torch.arange(lm.vocab_size, device=lm.device) % 4 == 0  # a quarter is allowed
    mask[list(lm.eos_ids)] = True
    exactly = {"max_tokens": tokens, "min_tokens": tokens}
    text, guided = Completion(lm, prompt, **exactly), Completion(guide, prompt, **exactly)
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
        "adapter": lambda: guided.sample_and_log_prob((particles,)),
        "SMC": smc.run,
    }


@contextmanager
def counting() -> Iterator[Mock]:
    """Counts how often SMC resamples, each time reordering its KV cache."""
    counted = Mock(side_effect=systematic)
    with patch.dict(SCHEMES, systematic=counted):
        yield counted


def networks(
    place: Place, checkpoint: Path | None, widths: list[int], vocab: int
) -> Iterator[tuple[str, Callable[[], LanguageModel], Callable[[], Any]]]:
    """Names, what makes the language model, and what makes the same network as transformers does."""
    if checkpoint is not None:
        yield checkpoint.name, lambda: place.language_model(checkpoint), lambda: place.plain(checkpoint)
        return

    def placed(width: int) -> LanguageModel:
        lm = language_model(width, vocab)
        place.put(lm.model)
        return lm

    for width in widths:
        yield f"width {width}", partial(placed, width), lambda width=width: place.put(network(width, vocab))


def goals(row: dict[str, Any], pretrained: bool) -> Iterator[Goal]:
    """What one cell should reach."""
    cell, n = f"{row['network']}, prompt {row['prompt']}, {row['particles']} rows", row["particles"]
    for name in OURS:
        ratio = statistics.median(row["ratios"][name])
        if not pretrained and name in REQUIRED:
            asked = REQUIRED_AFTER_LONG if row["prompt"] >= LONG else REQUIRED[name]
            yield Goal(f"{cell}: {name} / generate", asked, ratio)
        if pretrained and n in PRETRAINED:
            yield Goal(f"{cell}: {name} / generate", PRETRAINED[n][0], ratio)
            yield Goal(f"{cell}: {name}, share of peak", PRETRAINED[n][1], row["share of peak"][name])


def main(
    out: Out = None,
    vocab: Annotated[int, typer.Option(help="Vocabulary of the random models.")] = 2048,
    tokens: Annotated[int | None, typer.Option(help="Of every text; default 24, of a checkpoint 20.")] = None,
    repetitions: Annotated[int | None, typer.Option(help="Of each cell; default 9, of a checkpoint 3.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="Widths of the random models.")] = None,
    particles: Annotated[list[int] | None, typer.Option(help="Numbers of texts at a time.")] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="Lengths of the prompt.")] = None,
    checkpoint: Checkpoint = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    in_markdown: InMarkdown = False,
) -> None:
    """Time all cells and print the ratios; exit with 1 where a requirement is missed."""
    torch.set_num_threads(1)
    place = Place(device, dtype)
    pretrained = checkpoint is not None
    tokens, repetitions = tokens or (20 if pretrained else 24), repetitions or (3 if pretrained else 9)
    found, shown, limits = [], [], []
    for name, make, make_plain in networks(place, checkpoint, width or [64, 256], vocab):
        # A network for each: the base is not slowed by adapters that it does not use.
        lm, guide, plain = make(), make().with_adapter(LORA), make_plain()
        matrices = Matrices.of(plain, guide)
        for length in prompt or ([10, 100] if pretrained else [6, LONG]):
            start = torch.randint(3, lm.vocab_size, (length,), device=device)
            for n in particles or ([16, 64] if pretrained else [32, 128]):
                print(f"{name}, prompt {length}, {n} rows", file=sys.stderr)
                runs = contestants(lm, guide, plain, start, n, tokens)
                few = 2 if pretrained and place.on_cpu else tokens
                for run in contestants(lm, guide, plain, start, n, few).values():
                    run()  # to warm up
                with counting() as counted:
                    seconds = place.timed({**runs, **place.limits()}, repetitions, warm=False)
                limits.append(place.speeds(seconds))
                useful = {k: matrices.forward(n * (tokens - 1), adapter=k == "adapter") for k in runs}
                row: dict[str, Any] = {"network": name, "prompt": length, "particles": n, "seconds": seconds}
                row["ratios"] = {k: faster(seconds, "generate", k) for k in OURS}
                row["share of peak"] = {k: useful[k] / statistics.median(s) / limits[-1][0] for k, s in seconds.items()}
                row |= {"resamplings": counted.call_count / repetitions, "limits": limits[-1]}
                found.append(row)
                cells = [f"{statistics.median(seconds['generate']):.3f}", *(spread(row["ratios"][k]) for k in OURS)]
                shares = " ".join(f"{share:.0%}" for share in row["share of peak"].values())
                shown.append([name, str(length), str(n), *cells, shares, f"{row['resamplings']:.1f}"])
    machine = introduce(place, limits, sum(p.nbytes for p in plain.parameters()))
    show(
        f"{tokens} new tokens: times as fast as generate, median (range) of {repetitions}; shares of peak in order",
        ["network", "prompt", "rows", "generate, s", *OURS, "share of peak", "resampled"], shown, in_markdown,
    )  # fmt: skip
    save(out, machine=machine, tokens=tokens, cells=found)
    judge((goal for row in found for goal in goals(row, pretrained)), in_markdown)


if __name__ == "__main__":
    typer.run(main)
