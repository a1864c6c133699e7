"""Speed of scoring texts and of training on them, as a share of the machine's peak.

    python -m benchmarks.passes --out passes.json
    python -m benchmarks.passes --checkpoint PATH    # a pretrained network instead of a random one

*Scoring* is log p of texts after a prompt, without gradient; *training* is log q of texts under an adapter, and its
gradient.  Seconds are those of one thread; repetitions alternate with a large matrix product.  Only operations that no
implementation can avoid are counted: all tokens of a text except the last pass all matrices, with two operations per
number; a gradient passes the frozen matrices once more and those of the adapter twice more.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Annotated, Any

import pyro
import torch
import typer

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
    introduce,
    judge,
    save,
    show,
    spread,
)
from benchmarks.sampling import networks
from lmppl import LanguageModel
from lmppl.distributions import Completion

SCORED, TRAINED = (64, 32), (16, 20)  # texts and their tokens
SHARE = 0.6  # asked of a pretrained network


def scoring(lm: LanguageModel, prompt: torch.Tensor, texts: torch.Tensor) -> Callable[[], Any]:
    """log p of texts (N, T) after one prompt."""
    law = Completion(lm, prompt, max_tokens=texts.shape[1], stop=None)

    def run() -> Any:
        with torch.no_grad():
            return law.log_prob(texts)

    return run


def training(guide: LanguageModel, prompt: torch.Tensor, texts: torch.Tensor) -> Callable[[], Any]:
    """The gradient of the sum of log q of texts (N, T)."""
    parameters = guide.trainable_parameters()
    law = Completion(guide, prompt, max_tokens=texts.shape[1], stop=None)
    return lambda: torch.autograd.grad(law.log_prob(texts).sum(), parameters)


def main(
    out: Out = None,
    width: Annotated[int, typer.Option(help="Width of the random network.")] = 128,
    vocab: Annotated[int, typer.Option(help="Vocabulary of the random network.")] = 2048,
    prompt: Annotated[int, typer.Option(help="Length of the prompt.")] = 10,
    scored: Annotated[tuple[int, int], typer.Option(help="Texts that are scored, and their tokens.")] = SCORED,
    trained: Annotated[tuple[int, int], typer.Option(help="Texts that are trained on, and their tokens.")] = TRAINED,
    repetitions: Annotated[int, typer.Option(help="Of each.")] = 5,
    checkpoint: Checkpoint = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    in_markdown: InMarkdown = False,
) -> None:
    """Time both and print their shares of peak; exit with 1 where a pretrained network's is less than is asked."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.enable_validation(False)
    place = Place(device, dtype)
    ((name, make, make_plain),) = networks(place, checkpoint, [width], vocab)
    lm = make()
    guide = lm.with_adapter(LORA)
    matrices = Matrices.of(make_plain(), guide)
    start, *texts = (torch.randint(3, lm.vocab_size, s, device=device) for s in ((prompt,), scored, trained))
    runs = {"scoring": scoring(lm, start, texts[0]), "training": training(guide, start, texts[1])}
    work = {
        "scoring": matrices.forward(scored[0] * (scored[1] - 1)),
        "training": matrices.training(trained[0] * (trained[1] - 1)),
    }
    seconds = place.timed({**runs, **place.limits()}, repetitions)
    limits = place.speeds(seconds)
    share = {k: work[k] / statistics.median(seconds[k]) / limits[0] for k in runs}
    machine = introduce(place, [limits])
    sizes = {"scoring": scored, "training": trained}
    rows = [
        [k, "{} x {}".format(*sizes[k]), spread(seconds[k]), f"{work[k] / 1e9:.1f}", f"{share[k]:.0%}"] for k in runs
    ]
    header = ["pass", "texts x tokens", "seconds", "GFLOP", "share of peak"]
    show(f"{name}: medians of {repetitions} and ranges", header, rows, in_markdown)
    save(out, machine=machine, network=name, sizes=sizes, seconds=seconds, operations=work, share=share)
    judge([Goal(f"{k}, share of peak", SHARE, share[k]) for k in runs] if checkpoint else [], in_markdown)


if __name__ == "__main__":
    typer.run(main)
