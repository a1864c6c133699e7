"""Long prompts, long texts and a large vocabulary on your own language model: are results right, and at what cost?

    python -m benchmarks.lengths --lm LM [--budget 4096] [--out lengths.json]

Each case runs in its own process. Texts are drawn and then scored. *Difference* is the largest difference, in nats,
between the log-probability with which a text was drawn and its `log_prob`, for all texts together and for the first one
alone. *Peak* is the peak memory above what the process, with the weights, had before. A training step is VarGrad over
whole texts, with a LoRA adapter of rank 16 on all linear layers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import peft
import pyro
import torch
import transformers
import typer

from benchmarks.paper.study import markdown
from lmppl import LanguageModel, files, text
from lmppl.distributions import Completion
from lmppl.engine.prompts import prompts
from lmppl.inference import GFlowNet, VarGrad
from lmppl.language_model import TOKEN_BUDGET

# prompts' tokens, texts drawn for each, their tokens, and whether a step is made too
CASES: dict[str, tuple[Sequence[int], int, int, bool]] = {
    "short": ([10], 16, 20, True),
    "texts of 256 tokens": ([10], 16, 256, True),
    "a prompt of 4,000 tokens": ([4000], 16, 20, False),
    "prompts of 5 to 4,000 tokens": ([5, 60, 700, 4000], 4, 20, False),
}
STORY = "Once upon a time there was a girl who lived beside the sea, and every morning she walked along the shore. "


def held() -> tuple[float, float]:
    """MiB that this process holds, and the most it has held since the last `forgotten`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(found["VmRSS"]) / 1024, int(found["VmHWM"]) / 1024


def forgotten() -> float:
    """Start to measure the most memory anew; MiB held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return held()[0]


def cell(path: str, name: str, budget: int) -> dict[str, Any]:
    """One case."""
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    transformers.logging.disable_progress_bar()
    lm = LanguageModel.from_pretrained(path)
    lm.token_budget = budget
    lengths, rows, tokens, step = CASES[name]
    story = lm.encode(STORY * (max(lengths) // 10))
    x = text.cat(torch.stack([text.pad(story[:n], max(lengths)) for n in lengths]))
    with torch.no_grad():
        Completion(lm, x[..., :4], max_tokens=2).log_prob(Completion(lm, x[..., :4], max_tokens=2).sample((2,)))
    prompts(lm.network).forget()
    fn = Completion(lm, x, max_tokens=tokens, stop=None)
    pyro.set_rng_seed(0)
    found: dict[str, Any] = {}

    def measured(what: str, run: Any) -> Any:
        before, start = forgotten(), time.process_time()
        result = run()
        found[f"{what}, s"], found[f"{what}, MiB"] = time.process_time() - start, held()[1] - before
        return result

    z, drawn = measured("sampling", lambda: fn.sample_and_log_prob((rows,)))
    prompts(lm.network).forget()
    with torch.no_grad():
        scored = measured("scoring", lambda: fn.log_prob(z))
        alone = Completion(lm, x[0][x[0] != text.PAD], max_tokens=tokens, stop=None).log_prob(z[0, 0])
    found["difference"] = max(float((scored - drawn).abs().max()), float((alone - drawn[0, 0]).abs()))
    if step:
        guide = lm.with_adapter(peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        trainer = GFlowNet(
            lambda: pyro.sample("z", fn),
            lambda: pyro.sample("z", Completion(guide, x, max_tokens=tokens, stop=None)),
            VarGrad(num_particles=rows, max_plate_nesting=1),
            optimizer=torch.optim.AdamW(guide.trainable_parameters(), lr=1e-4),
        )
        measured("a step", trainer.step)
    return found


def main(
    lm: Annotated[Path, typer.Option(help="A Hugging Face checkpoint.")],
    out: Annotated[Path | None, typer.Option(help="Write the measurements to this JSON file.")] = None,
    budget: Annotated[int, typer.Option(min=1, help="The token budget.")] = TOKEN_BUDGET,
    only: Annotated[list[str] | None, typer.Option(help="Some of the cases.")] = None,
) -> None:
    """Measure every case and print the table."""
    found = {}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for name in only or CASES:
            found[name] = pool.submit(cell, str(lm), name, budget).result()
    runs = ("sampling", "scoring", "a step")
    rows = []
    for name, figures in found.items():
        shown = [
            f"{figures[f'{r}, s']:.1f} s, {figures[f'{r}, MiB']:.0f} MiB" if f"{r}, s" in figures else "-" for r in runs
        ]
        rows.append([name, f"{figures['difference']:.1e}", *shown])
    print(f"Token budget {budget:,}; processor seconds of one thread.\n")
    print(markdown(("case", "difference, nats", *runs), rows))
    if out is not None:
        files.write(out, json.dumps({"budget": budget, "cases": found}, indent=1).encode())


if __name__ == "__main__":
    typer.run(main)
