"""Training samples written by a server, an inference engine's that answers faster than the learner writes."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ... import randomness
from ...distributions import Completion
from ...engine.scoring import with_bos
from ...language_model import LanguageModel
from ...text import PAD
from ..arguments import at_least, instance_of
from .exploration import Exploration, Source, Values


class Served(Exploration):
    r"""The guide's texts, written by a server that speaks OpenAI's completions protocol, as vLLM does.

    Off-policy is free: whatever weights the server has, u is evaluated by the learner, log q included, on the token ids
    that come back, and the loss vanishes at the posterior.  A server that lags behind costs coverage, not correctness;
    `refresh` brings it up to date.  What is sent are token ids, what comes back must be too (``return_token_ids``).

    :param lm: whose texts it writes: the `LanguageModel` of the guide.  Sites of others are drawn by the learner.
    :param url: up to and with the version, "http://localhost:8000/v1".
    :param model: what the server calls the model, or the adapter on it.
    :param api_key: sent as a bearer token, where given.
    :param requests: how many are under way at once; a request asks for all texts after one prompt.
    :param timeout: seconds until an answer is given up.

    :raises ConnectionError: where the server does not answer, or with an error.
    :raises ValueError: for texts with ``allowed`` or ``tools``, which no server knows of, or with stop strings, which
        servers find within tokens too; and for an answer that has no token ids, or others than can be.

    Example::

        served = Served(q, "http://localhost:8000/v1", "guide")
        GFlowNet(model, guide, optimizer=optimizer, exploration=Mixture((served, 0.75), (Tempered(1.5, 1.0), 0.25)))
    """

    def __init__(
        self,
        lm: LanguageModel,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        requests: int = 16,
        timeout: float = 300.0,
    ):
        instance_of(LanguageModel, lm=lm)
        at_least(1, requests=requests)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http://HOST:PORT/v1, got {url!r}")
        self.lm, self.url, self.model = lm, url.rstrip("/"), model
        self.api_key, self.requests, self.timeout = api_key, requests, timeout

    def draw(self, source: Source, num_particles: int) -> Values:
        return source.draw(source.guide, num_particles, self._elsewhere)

    def refresh(self, directory: str | Path) -> None:
        """Save the adapter to a directory that the server sees, and have it loaded under the server's name for it.

        vLLM does so if it was started with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``.
        """
        self.lm.save_pretrained(directory)
        where = str(Path(directory).resolve())
        self._ask("load_lora_adapter", {"lora_name": self.model, "lora_path": where, "load_inplace": True})

    def _elsewhere(self, fn: TorchDistribution) -> TorchDistribution:
        if not isinstance(fn, Completion) or fn.lm is not self.lm:
            return fn
        if fn.allowed is not None or fn.tools:
            raise ValueError(
                "exploration: a server knows nothing of allowed= and tools=; draw these texts from the guide"
            )
        if fn.stop_strings is not None:
            raise ValueError(
                f"exploration: a server ends texts at {list(fn.stop_strings.strings)} even within a token; draw these "
                "texts from the guide"
            )
        return _Remote(fn, self)

    def _ask(self, what: str, content: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        request = urllib.request.Request(f"{self.url}/{what}", json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                said = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                reason = error.read()[:300].decode(errors="replace")
            raise ConnectionError(f"url: {self.url}/{what} answered {error.code}: {reason}") from error
        except OSError as error:
            raise ConnectionError(f"url: no answer from {self.url}/{what}: {error}") from error
        return json.loads(said) if what == "completions" else said


class _Remote(TorchDistribution):
    """A text's distribution that asks the server for samples."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, fn: Completion, served: Served):
        self.fn, self.served = fn, served
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Texts (*sample_shape, *batch, *event): one request for all rows that continue one prompt in one way."""
        fn, shape = self.fn, torch.Size(sample_shape) + self.batch_shape
        prompt = with_bos(fn.lm, fn.prompt)
        prompts = prompt.expand(*shape, -1).reshape(shape.numel(), -1).tolist()
        limits = [x.expand(shape).flatten().tolist() for x in (fn.max_tokens, fn.min_tokens, fn.temperature)]
        rows = defaultdict(list)
        for row, (ids, *others) in enumerate(zip(prompts, *limits, strict=True)):
            rows[tuple(i for i in ids if i != PAD), *others].append(row)
        with randomness.apart():
            seeds = torch.randint(2**31, (len(rows),)).tolist()
        value = torch.full((shape.numel(), self.event_shape[0]), PAD)
        with ThreadPoolExecutor(self.served.requests) as pool:
            answers = pool.map(self._texts, rows, map(len, rows.values()), seeds)
            for at, texts in zip(rows.values(), answers, strict=True):
                for row, ids in zip(at, texts, strict=True):
                    value[row, : len(ids)] = torch.tensor(ids)
        return value.view(*shape, -1).to(fn.prompt.device)

    def _texts(self, key: tuple[Any, ...], count: int, seed: int) -> list[list[int]]:
        """``count`` texts after one prompt, their stops included."""
        prompt, longest, shortest, temperature = key
        stops = self.fn.stop.tolist()
        if longest == 0:
            return [stops[:1]] * count
        content = {
            "model": self.served.model, "prompt": list(prompt), "n": count, "seed": seed, "temperature": temperature,
            "max_tokens": longest, "min_tokens": shortest, "stop_token_ids": stops, "return_token_ids": True,
            "ignore_eos": True, "top_p": 1.0, "top_k": 0,  # stop_token_ids holds every end that is one
        }  # fmt: skip
        choices = self.served._ask("completions", content).get("choices", [])
        if len(choices) != count:
            raise ValueError(f"url: the server gave {len(choices)} texts, {count} were asked for")
        return [self._complete(choice, longest, shortest, stops) for choice in choices]

    def _complete(self, choice: dict[str, Any], longest: int, shortest: int, stops: list[int]) -> list[int]:
        """A text with its stop, which is certain at the limit and which some servers leave out."""
        ids = choice.get("token_ids")
        if not isinstance(ids, list):
            raise ValueError("url: the server's answer has no token_ids; it must know return_token_ids, as vLLM does")
        if stops and not (ids and ids[-1] in stops):
            ended = choice.get("stop_reason") if choice.get("finish_reason") == "stop" else None
            ids = [*ids, ended if ended in stops else stops[0]]
        body = ids[:-1] if stops else ids
        least = shortest if stops else longest
        if not least <= len(body) <= longest or any(i in stops or not 0 <= i < self.fn.lm.vocab_size for i in body):
            raise ValueError(f"url: the server wrote {ids}, which is no text of {least} to {longest} tokens and a stop")
        return ids
