"""Replay: keeps training values for each observation and uses them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine import Trace
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from .... import text
from ....shapes import broadcast_shapes
from ...core.arguments import at_least, is_number
from ...core.observations import Observations, Tokens, merge, observe, split, tokens_of
from ...core.programs import Draw, Program, Sketch, Substitute, Values, parameters_of
from ...core.query import Query
from ...core.sites import text_of
from ...core.weights import log_density
from ...processes import distributed
from ..loop.schedules import Schedule, at, checked

PRIORITIES = ("reward", "recency", "both")


@dataclass
class Entry:
    """One value of all latents of one observation."""

    values: Values  # (*other plate axes, *event) by site, on the CPU
    log_p: float  # log p(z, observed); NaN if the model has changed since


class Replay:
    r"""A buffer of latent values for each observation, from which a ``fraction`` of every batch of particles is drawn.

    Off-policy samples are allowed, because u may be computed at any z: a value that was found once can be trained on
    again.  Of N particles, :math:`\min(round(fraction \cdot N), N - 1, stored)` are replayed, where *stored* is the
    smallest number of values that an observation of the batch has.  The others are drawn afresh, and stored with their
    log p(z, observed), which the loss has computed: storing costs no pass through the network.  The rewards of replayed
    values are always computed anew.

    :param capacity: the largest number of values for each observation.
    :param fraction: in [0, 1], of the particles.  A number or a function of the step.
    :param priority: "reward": values are drawn without replacement in proportion to p(z, observed)^(1/temperature), and
        the smallest is removed first; "recency": the newest are drawn, and the oldest is removed first; "both": half of
        each.
    :param temperature: of the priority by reward, > 0.  A number or a function of the step.
    :param min_distance: in [0, 1).  A value this close to a better one is not stored.  It is the normalised edit
        distance between the tokens of all texts, where a number of an ordinary latent counts as a token.  0: duplicates
        only.
    :param key: what identifies an observation.  None: for each element of the kept plates (those that enclose every
        site), a hash of the observed values and of the prompts that depend on no latent.  Or a function of the
        program's arguments that returns a sequence of strings or numbers, one for each plate element in row-major
        order.
    :param max_observations: how many observations are remembered; the one unseen for longest is removed first.  None:
        all.

    ``len(replay)`` is the number of stored values.  On several processes each has the whole buffer, and every new value
    goes to all.  When parameters of the model change, the stored rewards are discarded: a value with an unknown reward
    is drawn like the average one, and removed first.

    :raises ValueError: naming the argument that is out of its range.

    Example::

        gflownet = GFlowNet(model, guide, optimizer=optimizer, replay=Replay(capacity=64, min_distance=0.1))
        gflownet.demonstrate(x, y, values={"z": " He took the bread."})
        gflownet.fit(batches, steps=100)
    """

    def __init__(
        self,
        capacity: int = 64,
        fraction: Schedule = 0.25,
        priority: str = "reward",
        temperature: Schedule = 1.0,
        min_distance: float = 0.0,
        key: Callable[..., Iterable[Any]] | None = None,
        max_observations: int | None = None,
    ):
        at_least(1, capacity=capacity)
        if max_observations is not None:
            at_least(1, max_observations=max_observations)
        if priority not in PRIORITIES:
            raise ValueError(f"priority: expected one of {', '.join(PRIORITIES)}, got {priority!r}")
        is_number("a number in [0, 1)", lambda x: 0 <= x < 1, min_distance=min_distance)
        if key is not None and not callable(key):
            raise ValueError(f"key: expected a function of the program's arguments, got {key!r}")
        self.capacity, self.priority, self.min_distance = capacity, priority, min_distance
        self.fraction = checked(fraction, "fraction", lambda f: 0 <= f <= 1, "must lie in [0, 1]")
        self.temperature = checked(temperature, "temperature", lambda t: t > 0, "must be positive")
        self.key, self.max_observations = key, max_observations
        self._stored: dict[str, dict[Tokens, Entry]] = {}  # both oldest first
        self._texts: set[str] = set()  # the sites that are texts
        self._parameters: dict[int, tuple[list[Tensor], list[int]]] = {}  # of each task's model, with their versions

    def __len__(self) -> int:
        """How many values are stored, over all observations."""
        return sum(map(len, self._stored.values()))

    def invalidate(self, task: int | None = None) -> None:
        """Discards the rewards of the stored values, not the values.

        :param task: the task whose values are meant; None: all tasks.
        """
        for key, entries in self._stored.items():
            if task is None or key.startswith(f"{task}:"):
                for entry in entries.values():
                    entry.log_p = float("nan")

    def observations(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        nesting: int,
        task: int = 0,
    ) -> Observations:
        """The keys of a batch's observations, found without a call of the network.

        :param model: a Pyro program.
        :param guide: a Pyro program with the model's latent sites.
        :param args: the arguments of both.
        :param kwargs: their keyword arguments.
        :param nesting: how many axes their plates take.
        :param task: the number of the task; tasks do not share values.
        :returns: the observations, which the other methods take.
        :raises ValueError: where ``key`` returns another number of keys than the batch has observations.
        """
        seen, target = observe(Query(model, guide, args, kwargs, nesting), task, self.key)
        self._notice(task, target)
        keys, rank = distributed.gather(seen.keys), distributed.world().rank
        if len(keys) > 1:
            seen = replace(seen, elsewhere=(sum(keys[:rank], ()), sum(keys[rank + 1 :], ())))
        return seen

    def available(self, seen: Observations, num_particles: int, step: int) -> int:
        """How many of the particles can be replayed.

        :param seen: the observations of the batch.
        :param num_particles: particles for each observation.
        :param step: the number of the step, for schedules.
        """
        before, after = seen.elsewhere
        stored = min((len(self._stored.get(key, ())) for key in before + seen.keys + after), default=0)
        return min(round(at(self.fraction, step) * num_particles), num_particles - 1, stored)

    def draw(self, seen: Observations, num_particles: int, step: int) -> Values:
        """Draws stored values of every latent, no value twice for one observation.

        :param seen: the observations of the batch.
        :param num_particles: how many values for each observation, at most `available`.
        :param step: the number of the step, for schedules.
        :returns: by site, (particle, *plate axes, *event).
        """
        temperature = at(self.temperature, step)
        before, after = seen.elsewhere  # drawn for them too: the random numbers are those of one process
        every = before + seen.keys + after
        chosen = [self._choose(list(self._stored[key].values()), num_particles, temperature) for key in every]
        chosen = chosen[len(before) : len(before) + len(seen.keys)]
        drawn = {}
        for name, (event_dim, _) in seen.sites.items():
            values = [entry.values[name] for entries in chosen for entry in entries]
            stacked = _stack(values).unflatten(0, (len(chosen), num_particles)).transpose(0, 1)
            drawn[name] = merge(stacked, seen.plates, event_dim)
        return drawn

    def _choose(self, entries: list[Entry], n: int, temperature: float) -> list[Entry]:
        newest = {"reward": 0, "recency": n, "both": n // 2}[self.priority]
        entries = entries[::-1]
        recent, others = entries[:newest], entries[newest:]
        logits = torch.tensor([entry.log_p for entry in others], dtype=torch.float64) / temperature
        known = logits[~logits.isnan()]
        average = known.logsumexp(0) - torch.tensor(len(known)).log() if len(known) else torch.tensor(0.0)
        logits = torch.where(logits.isnan(), average, logits)
        gumbel = -torch.empty_like(logits).exponential_().log()  # the n largest are draws without replacement
        return recent + [others[i] for i in (logits + gumbel).topk(n - newest).indices.tolist()]

    def add(self, seen: Observations, values: Values, log_p: Tensor, guide: Trace | None = None) -> None:
        """Stores values with their log p(z, observed), or updates what is stored.

        A stored value gets its new log p and keeps its age; a value of probability zero is removed.

        :param seen: the observations of the batch.
        :param values: by site, (n, *plate axes, *event).
        :param log_p: log p(z, observed), (n, *kept).
        :param guide: a trace at these values.  Its masks tell which sites a particle has; masked sites do not
            distinguish values.  None: there are no masks.
        """
        parts = {name: split(values[name], seen.plates, event_dim).cpu() for name, (event_dim, _) in seen.sites.items()}
        told = [
            tokens_of(
                parts[name], event_dim, is_text, None if guide is None else guide.nodes[name]["mask"], seen.plates
            )
            for name, (event_dim, is_text) in seen.sites.items()
        ]  # by site, particle and observation
        self._texts |= {name for name, (_, is_text) in seen.sites.items() if is_text}
        rewards = log_p.reshape(len(log_p), len(seen.keys)).tolist()
        found = [
            (
                key,
                [
                    (
                        tuple(token for site in told for token in site[n][k]),
                        {name: part[n, k] for name, part in parts.items()},
                        row[k],
                    )
                    for n, row in enumerate(rewards)
                ],
            )
            for k, key in enumerate(seen.keys)
        ]
        for key, rows in [pair for of_process in distributed.gather(found) for pair in of_process]:
            entries = self._stored.pop(key, {})
            self._stored[key] = entries  # now the newest observation
            for tokens, value, reward in rows:
                self._insert(entries, tokens, value, reward)
            self._evict(entries)
        while self.max_observations is not None and len(self._stored) > self.max_observations:
            self._stored.pop(next(iter(self._stored)))

    def _insert(self, entries: dict[Tokens, Entry], tokens: Tokens, value: Values, log_p: float) -> None:
        if not log_p > -float("inf"):
            entries.pop(tokens, None)
        elif tokens in entries:
            entries[tokens].log_p = log_p
        else:
            d = self.min_distance
            near = [t for t in entries if Levenshtein.normalized_distance(t, tokens, score_cutoff=d) <= d] if d else []
            if any(entries[t].log_p >= log_p for t in near):
                return
            for t in near:
                del entries[t]
            own = {name: (_trim(v) if name in self._texts else v).clone() for name, v in value.items()}
            entries[tokens] = Entry(own, log_p)

    def _evict(self, entries: dict[Tokens, Entry]) -> None:
        excess = len(entries) - self.capacity
        if excess <= 0:
            return
        order = list(entries)  # the oldest first
        if self.priority != "recency":
            safe = self.capacity // 2 if self.priority == "both" else 0
            order = order[: len(order) - safe]  # the newest stay, whatever their rewards
            log_p = {t: entries[t].log_p for t in order}
            order.sort(key=lambda t: log_p[t] if log_p[t] == log_p[t] else -float("inf"))
        for tokens in order[:excess]:
            del entries[tokens]

    def _notice(self, task: int, model: Trace) -> None:
        """Discards a task's rewards where parameters of its model have changed since the last call."""
        parameters = parameters_of(model)
        versions = [p._version for p in parameters]
        before = self._parameters.get(task)
        if before is not None and not (
            len(before[0]) == len(parameters)
            and all(a is b for a, b in zip(before[0], parameters, strict=True))
            and before[1] == versions
        ):
            self.invalidate(task)
        self._parameters[task] = (parameters, versions)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is stored, for a checkpoint.

        :returns: tensors by name, and a dict that JSON can hold.
        """
        for task, (parameters, versions) in self._parameters.items():
            if [p._version for p in parameters] != versions:
                self.invalidate(task)
        tensors: dict[str, Tensor] = {}
        for i, entries in enumerate(self._stored.values()):
            tensors[f"replay.{i}"] = torch.tensor([e.log_p for e in entries.values()], dtype=torch.float64)
            for name in next(iter(entries.values())).values if entries else ():
                tensors[f"replay.{i}.{name}"] = _stack([e.values[name] for e in entries.values()])
        tokens = [[list(t) for t in entries] for entries in self._stored.values()]
        return tensors, {"keys": list(self._stored), "tokens": tokens, "texts": sorted(self._texts)}

    def restore(self, tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
        """Restores what `state` returned.

        :param tensors: the tensors by name.
        :param own: the dict.
        """
        self._stored, self._parameters, self._texts = {}, {}, set(own["texts"])
        for i, key in enumerate(own["keys"]):
            prefix = f"replay.{i}."
            sites = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
            self._stored[key] = {
                tuple(tokens): Entry({n: _trim(v[j]) if n in self._texts else v[j] for n, v in sites.items()}, log_p)
                for j, (tokens, log_p) in enumerate(zip(own["tokens"][i], tensors[f"replay.{i}"].tolist(), strict=True))
            }


def _trim(value: Tensor) -> Tensor:
    """Texts without the columns that hold only padding."""
    return value[..., : int(text.length(value).max())]


def _stack(values: list[Tensor]) -> Tensor:
    """Values of one site as one tensor, texts padded to the longest."""
    width = max(v.shape[-1] for v in values) if values[0].dim() else 0
    return torch.stack([v if not v.dim() or v.shape[-1] == width else text.pad(v, width) for v in values])


@torch.no_grad()
def demonstrations(replay: Replay, seen: Observations, query: Query, values: Mapping[str, Any]) -> None:
    """Stores values of latent sites with their log p(z, observed), by one pass of the model."""
    query = replace(query, max_plate_nesting=seen.plates.nesting)
    sketch = query.trace(query.proposal, Sketch(), particles=1)
    given: Values = {}
    for name, value in values.items():
        if name not in seen.sites:
            raise ValueError(f"values: {name!r} is not one of the latent sites {list(seen.sites)}")
        fn = sketch.nodes[name]["fn"]
        value = value if isinstance(value, Tensor) else _complete(fn, value)
        while value.dim() < 1 + query.nesting + fn.event_dim:
            value = value[None]
        batch = value.shape[: value.dim() - fn.event_dim]
        try:
            given[name] = value.expand(*broadcast_shapes(batch, fn.batch_shape), *value.shape[len(batch) :])
        except RuntimeError as error:
            raise ValueError(
                f"values: {name!r} has the batch shape {tuple(batch)}, expected (n, *{tuple(fn.batch_shape[1:])})"
            ) from error
    counts = {len(value) for value in given.values()} - {1}
    if len(counts) > 1:
        raise ValueError(f"values: the sites have {sorted(counts)} demonstrations; expected one number, or 1")
    n = max(counts, default=1)
    given = {name: value.expand(n, *value.shape[1:]) for name, value in given.items()}
    pair = query.run(Draw(), Substitute(given | seen.subsamples), particles=n)
    log_p = log_density(pair.model, seen.plates)[0].expand(n, *seen.plates.sizes)
    if bool((log_p == -torch.inf).any()):
        raise ValueError("values: some of these are impossible under the model, given the observations")
    replay.add(seen, pair.values, log_p, pair.proposal)


def _complete(fn: Any, strings: Any) -> Tensor:
    """Strings as texts of a site: encoded, and ended with its stop where it is missing."""
    site = text_of(fn)
    if site is None:
        raise ValueError("values: strings are possible for texts only")
    return site.complete(strings)
