"""Texts written by a server: a stand-in on this machine that speaks the completions protocol, with a tiny LM."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyro
import pytest
import torch
from changed_arguments import CASES, changed, plain
from problems import VOCAB, A, B, X, adapted, lm_guide, one_text, texts_of
from reference import Plain
from tasks import Task
from test_exploration import law, same_law
from tiny import flat_lm
from torch import Tensor

from lmppl import LanguageModel
from lmppl.constraints import ban
from lmppl.distributions import Completion
from lmppl.inference import Enumeration, GFlowNet, Mixture, OnPolicy, Served
from lmppl.inference.core.sites import text_of
from lmppl.inference.judging.quality import density_quality
from lmppl.inference.training.gflownet.exploration import Source
from lmppl.text import length


class Writer:
    """Answers requests for completions by a plain loop over tokens; ``asked`` has what came in."""

    def __init__(self, lm: LanguageModel, keeps_stop: bool = True):
        self.lm, self.keeps_stop, self.plain = lm, keeps_stop, Plain(lm)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()

    def answer(self, path: str, content: dict[str, Any]) -> dict[str, Any] | str:
        with self.lock:
            self.asked.append((path, content))
            if not path.endswith("/completions"):
                return "loaded"
            generator = random.Random(content["seed"])
            return {"choices": [self.text(content, generator) for _ in range(content["n"])]}

    def text(self, content: dict[str, Any], generator: random.Random) -> dict[str, Any]:
        stops = content["stop_token_ids"] + ([] if content["ignore_eos"] else [self.lm.eos_id])
        ids: list[int] = []
        while len(ids) < content["max_tokens"]:
            logits = self.plain.logits(tuple(content["prompt"]), tuple(ids)) / content["temperature"]
            if len(ids) < content["min_tokens"]:
                logits = logits.index_fill(0, torch.tensor(stops), -torch.inf)
            (token,) = generator.choices(range(len(logits)), logits.softmax(0).tolist())
            if token in stops:
                kept = [*ids, token] if self.keeps_stop else ids
                return {"token_ids": kept, "finish_reason": "stop", "stop_reason": token}
            ids.append(token)
        return {"token_ids": ids, "finish_reason": "length", "stop_reason": None}


@contextmanager
def serving(writer: Any) -> Iterator[str]:
    """The address at which ``writer.answer(path, content)`` is heard."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = writer.answer(self.path, content)
            body = (found if isinstance(found, str) else json.dumps(found)).encode()
            self.send_response(400 if found == "no" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # asks as often whether to end
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def drawn(lm: LanguageModel, url: str, guide: Any, n: int) -> Tensor:
    pyro.set_rng_seed(0)
    return Served(lm, url, "guide").draw(Source(one_text(lm).model, guide, (), {}, 1), n)["z"]


@pytest.mark.parametrize("keeps_stop", [True, False])
def test_texts_follow_the_servers_law(lm, keeps_stop):
    """3000 texts after each of two prompts, by two requests, within 5 standard errors; alike for the same seed."""
    guide_lm = adapted(lm)
    with serving(Writer(guide_lm, keeps_stop)) as url:
        z = drawn(guide_lm, url, lm_guide(guide_lm), 3000)
        again = drawn(guide_lm, url, lm_guide(guide_lm), 3000)
    assert z.shape == (3000, 2, 3) and torch.equal(z, again)
    same_law(lm, z, law(lm, guide_lm))


def test_what_is_asked_for_is_what_the_distribution_says(lm):
    writer = Writer(lm)
    with serving(writer) as url, torch.no_grad():
        limit, least = torch.tensor([0, 3, 4, 4]), torch.tensor([0, 2, 1, 1])
        fn = Completion(lm, X[[0, 0, 1, 1]], max_tokens=limit, min_tokens=least, stop=[".", B], temperature=2.0)
        z = Served(lm, url, "guide").remote(text_of(fn)).sample((5,))
        exact = Completion(lm, X, max_tokens=3, stop=None)
        fixed = Served(lm, url, "guide").remote(text_of(exact)).sample((5,))
    assert bool(fn.log_prob(z).isfinite().all()) and bool(exact.log_prob(fixed).isfinite().all())
    assert z[:, 0].tolist() == [[1, -1, -1, -1, -1]] * 5  # nothing fits but a stop: the server is not asked
    assert int(length(z)[:, 1].min()) >= 3
    asked = [{k: c[k] for k in ("n", "max_tokens", "min_tokens", "ignore_eos", "temperature")} for _, c in writer.asked]
    common = {"ignore_eos": True, "temperature": 2.0}
    assert sorted(asked[:2], key=lambda c: c["n"]) == [
        {"n": 5, "max_tokens": 3, "min_tokens": 2} | common,
        {"n": 10, "max_tokens": 4, "min_tokens": 1} | common,
    ]
    assert all(c["stop_token_ids"] == [] and c["max_tokens"] == 3 for _, c in writer.asked[2:])
    assert {tuple(c["prompt"]) for _, c in writer.asked} == {(A,), (B, A)}


@pytest.mark.parametrize(("name", "i"), CASES)
def test_no_argument_is_kept_from_the_server(lm, name, i):
    """What is asked for differs from what is asked for without it, or the texts are not asked for."""

    def requests(fn: Completion) -> list[str]:
        writer = Writer(lm)
        with serving(writer) as url:
            pyro.set_rng_seed(0)
            Served(lm, url, "guide").remote(text_of(fn)).sample((2,))
        return sorted(json.dumps(content, sort_keys=True) for _, content in writer.asked)

    with torch.no_grad():
        try:
            asked = requests(changed(lm, name, i))
        except ValueError as error:
            assert "exploration: a server" in str(error)
        else:
            assert asked != requests(plain(lm))


@pytest.mark.slow
def test_a_server_with_other_weights_teaches_the_same_posterior():
    """Its texts are the base model's throughout; log q is the learner's, so the guide still ends near the posterior.

    With 16 particles the total variation is 0.07 to 0.11 after as many steps (3 seeds), with 64 it is 0.074 and 0.085.
    """
    task = Task(layers=2)
    exact = Enumeration(task.model).run(*task.args)

    def distance() -> float:
        return float(density_quality(exact, task.guide, task.args, {}).total_variation.max())

    before = distance()
    with serving(Writer(task.lm)) as url:
        mixture = Mixture((Served(task.q, url, "base"), 0.5), (OnPolicy(), 0.5))
        optimizer = torch.optim.AdamW(task.q.trainable_parameters(), lr=1e-2)
        trainer = GFlowNet(task.model, task.guide, optimizer=optimizer, exploration=mixture, num_particles=64)
        trainer.fit([task.args], 250, progress=False)
    assert distance() < 0.1 < 0.3 < before


def test_refresh_hands_over_the_adapter(lm, tmp_path):
    guide_lm, writer = adapted(lm), Writer(lm)
    with serving(writer) as url:
        Served(guide_lm, url, "guide").refresh(tmp_path / "adapter")
    ((path, content),) = writer.asked
    assert path == "/v1/load_lora_adapter" and content["lora_name"] == "guide"
    loaded = lm.with_adapter(content["lora_path"])
    pairs = zip(loaded.trainable_parameters(), guide_lm.trainable_parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Says:
    def __init__(self, said: Any):
        self.said = said

    def answer(self, path: str, content: dict[str, Any]) -> Any:
        return self.said if isinstance(self.said, str) else {"choices": [self.said] * content["n"]}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("no", "answered 400: no"),
        ("", "is not JSON"),
        ("<html>", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("5", "no list of choices"),
        ('{"choices": {"a": 1}}', "no list of choices"),
        ('{"choices": [5, 6, 7, 8]}', "no list of choices"),
        ('{"choices": []}', "has 0 texts, 4 were asked for"),
        ('{"choices": [{}, {}, {}, {}, {}]}', "has 5 texts, 4 were asked for"),
        ({"text": "a"}, "no token_ids"),
        ({"token_ids": "2 0"}, "no token_ids"),
        ({"token_ids": [5.7, 0]}, "integers"),
        ({"token_ids": [2.0, 0]}, "integers"),
        ({"token_ids": [True, 0]}, "integers"),
        ({"token_ids": ["2", 0]}, "integers"),
        ({"token_ids": [-1, 0]}, "not a text of 0 to 2 tokens"),
        ({"token_ids": [10**30, 0]}, "not a text of 0 to 2 tokens"),
        ({"token_ids": [2, 2, 2, 0]}, "not a text of 0 to 2 tokens"),
        ({"token_ids": [VOCAB, 0]}, "not a text of 0 to 2 tokens"),
        ({"token_ids": [0, 2, 0]}, "not a text of 0 to 2 tokens"),
    ],
)
def test_an_answer_that_cannot_be_is_refused(lm, said, message):
    with serving(Says(said)) as url, pytest.raises(ConnectionError, match=f"url: .*{url}/completions.*{message}"):
        drawn(lm, url, lm_guide(lm), 4)


@pytest.mark.parametrize("reason", [True, 0.0, [0], None, "a"])
def test_a_stop_that_is_no_token_id_is_none(lm, reason):
    """The stops of the guide's texts are 0 and no other: what the server names instead is not taken for it."""
    with serving(Says({"token_ids": [2], "finish_reason": "stop", "stop_reason": reason})) as url:
        z = drawn(lm, url, lm_guide(lm), 4)[..., :2]
    assert bool((z == torch.tensor([2, 0])).all())


def test_bad_arguments_are_named(lm):
    with pytest.raises(ConnectionError, match="url: no answer from http://127.0.0.1:9/v1/completions"):
        drawn(lm, "http://127.0.0.1:9/v1", lm_guide(lm), 4)
    for url in (
        "localhost:8000",
        "http://",
        "http://h:x/v1",
        "ftp://h/v1",
        "http://me:secret@h/v1",
        "http://h/v1?a",
        5,
    ):
        with pytest.raises(ValueError, match="url: expected http"):
            Served(lm, url, "guide")
    for timeout in (0, -1.0, float("inf"), float("nan"), "3", True):
        with pytest.raises(ValueError, match="timeout: expected a positive number"):
            Served(lm, "http://localhost:8000/v1", "guide", timeout=timeout)
    with pytest.raises(ValueError, match="max_bytes"):
        Served(lm, "http://localhost:8000/v1", "guide", max_bytes=0)
    for key in (5, b"secret"):
        with pytest.raises(ValueError, match="api_key"):
            Served(lm, "http://localhost:8000/v1", "guide", api_key=key)
    with pytest.raises(ValueError, match="model: expected an instance of str"):
        Served(lm, "http://localhost:8000/v1", 5)
    with pytest.raises(ValueError, match="api_key") as found:
        Served(lm, "http://localhost:8000/v1", "guide", api_key="secret\n")
    assert "secret" not in str(found.value)
    with pytest.raises(ValueError, match="lm: expected .*LanguageModel"):
        Served("gpt2", "http://localhost:8000/v1", "guide")
    with pytest.raises(ValueError, match="allowed= and tools="):
        Served(lm, "http://localhost:8000/v1", "guide").remote(
            text_of(Completion(lm, X, max_tokens=2, allowed=ban(lm, ["a"])))
        )
    other = Completion(flat_lm(vocab=VOCAB, seed=1), X, max_tokens=2)
    assert Served(lm, "http://localhost:8000/v1", "guide").remote(text_of(other)) is other
    assert texts_of(lm).shape[0] > 4
