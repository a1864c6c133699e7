"""One peer's side of `benchmarks.peers`, run by the interpreter of the peers' environment, which has no lmppl.

    .venv-peers/bin/python benchmarks/peers_worker.py llamppl CHECKPOINT

Each line of standard input is a task in JSON.  The answer is a line of JSON with the processor and wall-clock seconds
of the inference alone, and its log evidence.  Every run starts with empty caches.  Two settings favour the peers: keys
and values of the prompt are cached first, and one forward pass reads all particles (their defaults are no prompt cache,
and 20 particles per pass after a wait of 20 ms).
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import torch

ESS_THRESHOLD, RESAMPLING = 0.5, "systematic"
WAIT = 0.001  # seconds that the batching waits for further requests
Run = Callable[[], Awaitable[float]]  # answers the log evidence


def llamppl(path: str) -> tuple[Any, Callable[[dict[str, Any]], Run]]:
    """A model in its documented style: observe that the next token is allowed, sample it, step by step."""
    from llamppl import CachedCausalLM, LMContext, Model, smc_standard

    lm = CachedCausalLM.from_pretrained(path, backend="hf")

    class Constrained(Model):
        def __init__(self, task: dict[str, Any]):
            super().__init__()
            self.context = LMContext(lm, task["prompt"])
            assert self.context.tokens == task["ids"], "the prompt is encoded differently here"
            self.allowed, self.tokens = set(task["allowed"]), task["tokens"]

        def immutable_properties(self) -> set[str]:
            return {"allowed", "tokens"}

        async def step(self) -> None:
            await self.observe(self.context.mask_dist(self.allowed), True)
            await self.sample(self.context.next_token())
            if self.context.token_count == self.tokens:
                self.finish()

    def prepared(task: dict[str, Any]) -> Run:
        async def run() -> float:
            lm.cache_kv(task["ids"])
            particles = await smc_standard(Constrained(task), task["particles"], ESS_THRESHOLD, None, None, RESAMPLING)
            return float(np.logaddexp.reduce([p.weight for p in particles]) - np.log(len(particles)))

        return run

    return lm.model, prepared


def genlm(path: str) -> tuple[Any, Callable[[dict[str, Any]], Run]]:
    """The language model times a mask as a batched potential, each token drawn from the product."""
    from genlm.control import Potential, PromptedLLM, direct_token_sampler

    lm = PromptedLLM.from_name(path, backend="hf")

    class Mask(Potential):
        def __init__(self, allowed: list[int]):
            super().__init__(lm.vocab, tables=lm.tables)
            self.allowed = frozenset(allowed)
            inside = torch.tensor([token.token_id in self.allowed for token in self.vocab] + [False])  # no EOS
            self.row = torch.zeros(len(inside)).masked_fill(~inside, -torch.inf)

        async def prefix(self, context: list[Any]) -> float:
            return 0.0 if all(token.token_id in self.allowed for token in context) else -np.inf

        complete = prefix

        async def logw_next(self, context: list[Any]) -> Any:
            return self.make_lazy_weights(self.row)

        async def batch_logw_next(self, contexts: list[list[Any]]) -> Any:
            return self.make_lazy_weights(self.row.expand(len(contexts), -1))

    def prepared(task: dict[str, Any]) -> Run:
        sampler = direct_token_sampler(lm.spawn(prompt_ids=task["ids"]) * Mask(task["allowed"]))

        async def run() -> float:
            lm.model.cache_kv(task["ids"])
            found = await sampler.smc(
                task["particles"], ESS_THRESHOLD, task["tokens"] + 1, resampling_method=RESAMPLING,
                terminate_when=lambda context: len(context) == task["tokens"],
            )  # fmt: skip
            return float(found.log_ml)

        return run

    return lm.model, prepared


PEERS = {"llamppl": llamppl, "genlm-control": genlm}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what the libraries print does not get between the answers
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model, prepare = PEERS[sys.argv[1]](sys.argv[2])
    model.timeout = WAIT
    for line in sys.stdin:
        task = json.loads(line)
        np.random.seed(task["seed"])
        torch.manual_seed(task["seed"])
        run = prepare(task)
        model.batch_size = task["particles"]
        model.clear_cache()
        wall, processor = time.perf_counter(), time.process_time()
        log_evidence = asyncio.run(run())
        seconds, wall = time.process_time() - processor, time.perf_counter() - wall
        print(json.dumps({"seconds": seconds, "wall": wall, "log_evidence": log_evidence}), file=answers, flush=True)


if __name__ == "__main__":
    main()
