"""Training samples written by a server, such as an inference engine that is faster than the learner."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from .... import randomness
from ....distributions import Completion
from ....engine.scoring import with_bos
from ....language_model import LanguageModel
from ....text import PAD
from ...core.arguments import at_least, instance_of
from ...core.programs import Values
from ...core.sites import Site
from .asking import BadAnswer, ask
from .exploration import Exploration, Source


class Served(Exploration):
    """Draws the guide's texts from a server with OpenAI's completions protocol, such as vLLM.

    Off-policy samples are allowed: whatever weights the server has, the learner computes u, log q included, from the
    returned token ids, and the loss is zero at the posterior.  A server with old weights costs coverage, not
    correctness; `refresh` updates it.  Token ids are sent, and must be returned (``return_token_ids``).

    :param lm: the `LanguageModel` of the guide.  The server writes the texts of its sites; the learner draws the
        others.
    :param url: the address with the version, "http://localhost:8000/v1".
    :param model: the server's name of the model, or of the adapter on it.
    :param api_key: sent as a bearer token; None: nothing is sent.
    :param requests: how many requests run at once; one request asks for all texts after one prompt.
    :param timeout: seconds for one request, even if the server is slow.
    :param max_bytes: the longest answer.

    :raises ConnectionError: when it draws, where the server does not answer within the timeout, answers with an error
        (a server error, 429 and a reset connection are first tried again a few times), redirects, or answers with
        anything but JSON with token ids that are possible texts.
    :raises ValueError: for arguments out of their range; when it draws, for texts with ``allowed`` or ``tools``, which
        no server knows, or with stop strings, which servers find within tokens, too.

    Example::

        served = Served(q, "http://localhost:8000/v1", "guide")
        exploration = Mixture((served, 0.75), (Tempered(1.5, 1.0), 0.25))
        trainer = GFlowNet(model, guide, optimizer=optimizer, exploration=exploration)
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
        max_bytes: int = 2**26,
    ):
        instance_of(LanguageModel, lm=lm)
        at_least(1, requests=requests, max_bytes=max_bytes)
        if not _is_address(url):
            raise ValueError(f"url: expected http://HOST:PORT/v1, got {url!r}")
        if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < math.inf:
            raise ValueError(f"timeout: expected a positive number of seconds, got {timeout!r}")
        instance_of(str, model=model)
        if api_key is not None and not (isinstance(api_key, str) and _is_secret(api_key)):
            raise ValueError("api_key: expected letters, digits and signs, without spaces or line ends")  # never shown
        self.lm, self.url, self.model = lm, url.rstrip("/"), model
        self.api_key, self.requests, self.timeout, self.max_bytes = api_key, requests, timeout, max_bytes

    def draw(self, source: Source, num_particles: int) -> Values:
        return source.draw(source.guide, num_particles, self.remote)

    def refresh(self, directory: str | Path) -> None:
        """Saves the adapter to a directory that the server can read, and makes the server load it under its name.

        vLLM does so if it was started with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``.

        :param directory: where to save the adapter.
        :raises ConnectionError: where the server does not load it.
        """
        self.lm.save_pretrained(directory)
        where = str(Path(directory).resolve())
        self._ask("load_lora_adapter", {"lora_name": self.model, "lora_path": where, "load_inplace": True})

    def remote(self, site: Site) -> TorchDistribution:
        """The distribution that a site's texts are drawn from: the server's for texts of this language model.

        :param site: a text site.
        :returns: a distribution whose samples the server writes, or the site's own.
        :raises ValueError: for texts with ``allowed``, ``tools`` or stop strings.
        """
        fn: TorchDistribution = site.fn
        if not isinstance(fn, Completion) or fn.lm is not self.lm:
            return fn
        if fn.allowed is not None or fn.tools:
            raise ValueError(
                "exploration: a server does not support allowed= and tools=; draw these texts from the guide"
            )
        if fn.stop_strings is not None:
            raise ValueError(
                f"exploration: a server ends texts at {list(fn.stop_strings.strings)} even within a token; draw these "
                "texts from the guide"
            )
        return _Remote(fn, self)

    def _ask(self, what: str, content: dict[str, Any]) -> bytes:
        return ask(f"{self.url}/{what}", content, api_key=self.api_key, timeout=self.timeout, max_bytes=self.max_bytes)


class _Remote(TorchDistribution):
    """The distribution of a text whose samples the server writes."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, fn: Completion, served: Served):
        self.fn, self.served = fn, served
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Texts (*sample_shape, *batch, *event): one request for all rows with the same prompt and limits."""
        fn, shape = self.fn, torch.Size(sample_shape) + self.batch_shape
        prompt = with_bos(fn.lm, fn.prompt)
        prompts = prompt.expand(*shape, -1).reshape(shape.numel(), -1).tolist()
        rules = fn.rules(shape)
        limits = [x.expand(len(prompts)).tolist() for x in (rules.max_tokens, rules.min_tokens, rules.temperature)]
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
        """``count`` texts after one prompt, with their stops."""
        prompt, longest, shortest, temperature = key
        stops = self.fn.stop.tolist()
        if longest == 0:
            return [stops[:1]] * count
        content = {
            "model": self.served.model, "prompt": list(prompt), "n": count, "seed": seed, "temperature": temperature,
            "max_tokens": longest, "min_tokens": shortest, "stop_token_ids": stops, "return_token_ids": True,
            "ignore_eos": True, "top_p": 1.0, "top_k": 0,  # stop_token_ids holds all stops
        }  # fmt: skip
        said = self.served._ask("completions", content)
        try:
            answer = json.loads(said)
        except (ValueError, RecursionError):
            raise self._bad(f"is not JSON: {said[:80]!r}") from None
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise self._bad(f"has no list of choices: {said[:80]!r}")
        if len(choices) != count:
            raise self._bad(f"has {len(choices)} texts, {count} were asked for")
        return [self._complete(choice, longest, shortest, stops) for choice in choices]

    def _complete(self, choice: dict[str, Any], longest: int, shortest: int, stops: list[int]) -> list[int]:
        """A text with its stop, which is certain at the length limit and which some servers leave out."""
        ids = choice.get("token_ids")
        if not isinstance(ids, list):
            raise self._bad("has no token_ids; the server must know return_token_ids, as vLLM does")
        if not all(type(i) is int for i in ids):  # True is an int, too
            raise self._bad(f"has {str(ids)[:200]} for token_ids; expected integers")
        if stops and not (ids and ids[-1] in stops):
            ended = choice.get("stop_reason") if choice.get("finish_reason") == "stop" else None
            ids = [*ids, ended if type(ended) is int and ended in stops else stops[0]]
        body = ids[:-1] if stops else ids
        least = shortest if stops else longest
        if not least <= len(body) <= longest or any(i in stops or not 0 <= i < self.fn.lm.vocab_size for i in body):
            raise self._bad(f"has {str(ids)[:200]}, which is not a text of {least} to {longest} tokens and a stop")
        return ids

    def _bad(self, what: str) -> BadAnswer:
        return BadAnswer(f"url: the answer of {self.served.url}/completions {what}")


def _is_secret(key: str) -> bool:
    return key.isascii() and key.isprintable() and " " not in key


def _is_address(url: str) -> bool:
    if not isinstance(url, str):
        return False
    try:
        parts = urlsplit(url)
        plain = parts.username is None and not parts.query and not parts.fragment
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and plain
    except ValueError:  # the port is not a number
        return False
