"""SMC compared with llamppl and genlm-control: the same task, the same number of particles, the same answer.

    make peers              # python -m benchmarks.peers --out out/peers.json
    python -m benchmarks.peers --checkpoint PATH    # a pretrained network with a byte-level tokenizer

The task: which texts of exactly T tokens after a prompt have no token with a letter e.  All three propose each token
from the language model under that mask, weigh by the mass that the mask keeps, and resample systematically below an
effective sample size of N/2.  So their estimates of the evidence, the probability that T tokens have no e, have the
same distribution.  The peers have their own environment (``--environment``, made on the first run with this
repository's versions of torch and transformers).  Each is a process (`benchmarks.peers_worker`) with one thread, and
they take turns. Only processor seconds of the inference are counted, without a cached prompt; a ratio above 1 is
faster than the peer. If the peers cannot be installed, the command says why and ends.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pyro
import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.measuring import Goal, Out, Place, introduce, judge, save, spread
from benchmarks.paper.study import markdown
from benchmarks.sampling import language_model
from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.engine.prompts import prompts
from lmppl.inference import SMC

PACKAGES = "llamppl==0.2.3", "genlm-control==0.4.1"
PEERS = "llamppl", "genlm-control"
REQUIRED = 5.0  # times as fast as either
SIGMAS = 5.0  # estimates of the evidence further apart than this disagree
REFERENCE, RUNS = 1024, 4  # particles and runs
INSTALLATION = 900  # seconds, at most
# One of them takes a GPU where it sees one.
ON_ONE_PROCESSOR = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).parent.parent


class Unavailable(Exception):
    """Why there are no peers to compare with."""


def interpreter(environment: Path, packages: Sequence[str] = PACKAGES) -> Path:
    """The Python of an environment with these packages, made where it is not there yet."""
    python, done = environment / "bin" / "python", environment / ".installed"
    wanted = "\n".join((*packages, torch.__version__))
    if done.is_file() and done.read_text() == wanted:
        return python
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["-c", str(ROOT / "constraints.txt")]
    deadline = time.monotonic() + INSTALLATION
    # torch first, by its exact version: on Linux without an accelerator an open range would pull gigabytes.
    first = f"torch=={torch.__version__.partition('+')[0]}"
    for command in ([sys.executable, "-m", "venv", str(environment)], [*pip, first], [*pip, *packages]):
        try:
            left = deadline - time.monotonic()
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=left)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or error.stdout.strip().splitlines() or ["no reason given"]
            raise Unavailable(f"{' '.join(packages)} cannot be installed: {lines[-1]}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{' '.join(packages)} cannot be installed: {error}") from None
    done.write_text(wanted)
    return python


class Peer:
    """A peer in its own process."""

    def __init__(self, python: Path, name: str, lm: Path, log: Path):
        self.name, self.log = name, log
        command = [str(python), str(ROOT / "benchmarks" / "peers_worker.py"), name, str(lm)]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | ON_ONE_PROCESSOR,
            )  # fmt: skip

    def __call__(self, task: dict[str, Any]) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            lines = self.log.read_text().strip().splitlines() or ["no reason given"]
            raise Unavailable(f"{self.name} does not run: {lines[-1]}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()


def random_network(folder: Path, width: int, vocab: int) -> Path:
    """A randomly initialised language model whose tokens are strings over "aeno", the shortest first."""
    tokens = ["<|endoftext|>", *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set("aeno"))]
    at, words = 0, list("aeno")
    while len(words) < vocab - len(tokens):
        words += [words[at] + c for c in "aeno"]
        at += 1
    tokens += words[: vocab - len(tokens)]
    bytes_ = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token=end, eos_token=end, pad_token=end)
    LanguageModel(language_model(width, vocab).model, tokenizer).save_pretrained(folder)
    return folder


def ours(lm: LanguageModel) -> Callable[[dict[str, Any]], dict[str, float]]:
    """The same task here."""

    def answer(task: dict[str, Any]) -> dict[str, float]:
        pyro.set_rng_seed(task["seed"])
        smc = lipogram(lm, task)
        prompts(lm.network).forget()
        wall, processor = time.perf_counter(), time.process_time()
        log_evidence = smc.run().log_evidence.item()
        return {
            "seconds": time.process_time() - processor,
            "wall": time.perf_counter() - wall,
            "log_evidence": log_evidence,
        }

    return answer


def lipogram(lm: LanguageModel, task: dict[str, Any], particles: int | None = None) -> SMC:
    """Exactly T tokens, each of them allowed."""
    prompt = torch.tensor(task["ids"])
    mask = torch.zeros(lm.vocab_size, dtype=torch.bool)
    mask[task["allowed"]] = True

    def texts(allowed: Tensor | None = None) -> None:
        pyro.sample("z", Completion(lm, prompt, max_tokens=task["tokens"], stop=None, allowed=allowed))

    return SMC(texts, lambda: texts(mask), particles or task["particles"], max_plate_nesting=0)


def log_mean(log_estimates: list[float]) -> tuple[float, float]:
    """The log of the mean of unbiased estimates, and its standard error."""
    x = torch.tensor(log_estimates, dtype=torch.float64)
    ratios = (x - x.max()).exp()
    error = ratios.std() / math.sqrt(len(x)) / ratios.mean()
    return float(ratios.mean().log() + x.max()), float(error)


def reference(lm: LanguageModel, task: dict[str, Any], particles: int) -> tuple[float, float]:
    """The log evidence by long runs of ours, and its standard error."""
    pyro.set_rng_seed(0)
    return log_mean([lipogram(lm, task, particles).run().log_evidence.item() for _ in range(RUNS)])


def measured(
    lm: LanguageModel, peers: list[Peer], task: dict[str, Any], truth: tuple[float, float], repetitions: int
) -> dict[str, Any]:
    """A cell: every contestant's seconds and evidence, and how far it is from a long run of ours."""
    contestants: dict[str, Any] = {"lmppl": ours(lm)} | {peer.name: peer for peer in peers}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for seed in range(repetitions + 1):
        for name, run in contestants.items():
            found = run(task | {"seed": seed})
            if seed:  # the first is a warm-up
                runs[name].append(found)
    cell: dict[str, Any] = {"particles": task["particles"], "prompt": len(task["ids"]), "log_evidence": truth}
    found = {name: log_mean([run["log_evidence"] for run in of]) for name, of in runs.items()}
    # All are equally distributed if all are right: what each one's few runs say of their spread is worth more together.
    error = math.sqrt(statistics.mean(e**2 for _, e in found.values()))
    for name, of in runs.items():
        cell[name] = {key: [run[key] for run in of] for key in ("seconds", "wall")}
        cell[name] |= {
            "log_evidence": found[name],
            "sigmas": abs(found[name][0] - truth[0]) / math.hypot(error, truth[1]),
        }
    return cell


def ratios(cell: dict[str, Any], peer: str, clock: str = "seconds") -> list[float]:
    """How many times as fast ours is, in each repetition."""
    return [theirs / ours for theirs, ours in zip(cell[peer][clock], cell["lmppl"][clock], strict=True)]


def main(
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", "--lm", help="A pretrained network; default: a random one.")
    ] = None,
    text: Annotated[str, typer.Option(help="Repeated and cut, it is the prompt.")] = (
        "Once upon a time there was a little dog. "
    ),
    prompt: Annotated[list[int] | None, typer.Option(help="Lengths of the prompt.")] = None,
    tokens: Annotated[int, typer.Option(help="New tokens of every text.")] = 16,
    particles: Annotated[list[int] | None, typer.Option(help="Default 32 and 128, of a checkpoint 32.")] = None,
    repetitions: Annotated[int | None, typer.Option(min=2, help="Of each cell; default 9, of a checkpoint 3.")] = None,
    long: Annotated[int | None, typer.Option(help="Particles of the reference; default 1024, or 128.")] = None,
    width: Annotated[int, typer.Option(help="Width of the random model.")] = 128,
    vocab: Annotated[int, typer.Option(help="Vocabulary of the random model.")] = 2048,
    environment: Annotated[Path, typer.Option(help="Where the peers are installed.")] = Path(".venv-peers"),
    out: Out = None,
) -> None:
    """Time all cells and print the ratios; exit with 1 where a requirement is missed or the answers disagree."""
    torch.set_num_threads(1)
    place, pretrained = Place(), checkpoint is not None
    repetitions, long = repetitions or (3 if pretrained else 9), long or (128 if pretrained else REFERENCE)
    cells: list[dict[str, Any]] = []
    peers: list[Peer] = []
    folder = Path(tempfile.mkdtemp())
    try:
        python = interpreter(environment)
        path = checkpoint or random_network(folder / "lm", width, vocab)
        lm = place.language_model(path)
        peers = [Peer(python, name, path, folder / f"{name}.log") for name in PEERS]
        words = lm.tokenizer.convert_ids_to_tokens(range(len(lm.tokenizer)))
        allowed = [i for i, word in enumerate(words) if "e" not in word.lower() and i != lm.eos_id]
        for length in prompt or [8, 100]:
            ids = lm.tokenizer.encode(text * length)[:length]
            task = {"prompt": lm.tokenizer.decode(ids), "ids": ids, "allowed": allowed, "tokens": tokens}
            truth = reference(lm, task, long)
            for n in particles or ([32] if pretrained else [32, 128]):
                print(f"prompt {length}, {n} particles", file=sys.stderr)
                cells.append(measured(lm, peers, task | {"particles": n}, truth, repetitions))
    except Unavailable as reason:
        Console(width=118).print(f"skipped: {reason}", soft_wrap=True)
        return
    finally:
        for peer in peers:
            peer.close()
        shutil.rmtree(folder)
    machine = introduce(place, [place.speeds(place.timed(place.limits(), repetitions))])
    print(f"{tokens} tokens without an e: times as fast as a peer, medians of {repetitions}, processor seconds.\n")
    print(table(cells))
    save(out, machine=machine, peers=PACKAGES, lm=checkpoint or "random", tokens=tokens, cells=cells)
    judge(goals(cells))


def goals(cells: list[dict[str, Any]]) -> Iterator[Goal]:
    """As fast as asked, and the right evidence."""
    for cell in cells:
        named = f"{cell['particles']} particles after {cell['prompt']} tokens"
        for peer in PEERS:
            yield Goal(f"times as fast as {peer}, {named}", REQUIRED, statistics.median(ratios(cell, peer)))
        for name in ("lmppl", *PEERS):
            yield Goal(f"standard errors of {name}'s evidence, {named}", SIGMAS, cell[name]["sigmas"], at_most=True)


def table(cells: list[dict[str, Any]]) -> str:
    """In Markdown: ratios (their range) and log evidence (its standard error)."""
    header = ["prompt", "particles", "lmppl, s", *PEERS, "log evidence", *(f"by {name}" for name in ("lmppl", *PEERS))]
    rows = []
    for cell in cells:
        speeds = [ratios(cell, peer) for peer in PEERS]
        known = [cell["log_evidence"], *(cell[name]["log_evidence"] for name in ("lmppl", *PEERS))]
        rows.append([str(cell["prompt"]), str(cell["particles"]), f"{statistics.median(cell['lmppl']['seconds']):.3f}"])
        rows[-1] += [spread(r, ".1f") for r in speeds]
        rows[-1] += [f"{log_z:.2f} ({error:.2f})" for log_z, error in known]
    return markdown(header, rows)


if __name__ == "__main__":
    typer.run(main)
