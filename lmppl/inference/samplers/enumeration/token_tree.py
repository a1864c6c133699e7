"""Best-first search of a text site's token tree: the most probable texts of a prior, and the mass of all others.

A *node* is an unfinished text; its children are its continuations by one token.  The most probable nodes of all trees
are expanded together, with one pass of the network for each batch.  So after every pass, the finished texts that are
more probable than every remaining node are the most probable of all texts.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from .... import text
from ....distributions import Completion
from ....distributions.arguments import refuse_nan
from ....distributions.token_steps import next_log_probs
from ....engine.scoring import score, with_bos
from ....engine.tuning import TUNING
from ...core.sites import Site, lm_of


class Texts(NamedTuple):
    """The texts found for one plate element, the most probable first."""

    root: Tensor  # (n,) the root that each text continues
    value: Tensor  # (n, *event)
    log_p: Tensor  # (n,) log p(text | root), in double precision
    joint: Tensor  # (n,) the same plus the root's log-probability
    left_out: float  # the mass of all other texts of these roots


class Growth(NamedTuple):
    """Children of expanded nodes: the parent (an index into a tree's pool), the token, and the joint log p."""

    parent: Tensor
    token: Tensor
    log_p: Tensor


def dtype_of(site: Site) -> torch.dtype:
    """The dtype of a text's log-probabilities."""
    lm = lm_of(site.fn)
    return torch.float64 if lm is None else torch.promote_types(lm.dtype, torch.float32)


def explore(site: Site, log_root: Tensor, allowance: Tensor, max_support: int) -> list[Texts]:
    """The texts of a text site for each plate element, found until the mass left out is within the ``allowance``.

    The site's flattened batch is (K * cells).  ``log_root`` (K, cells) is each root's log-probability, -inf for none;
    ``allowance`` (cells) is the mass that may be left out.
    """
    network = Network(site) if isinstance(site.fn, Completion) else Stepped(site)
    cells = log_root.shape[1]
    trees = [Tree(network, log_root[:, c], c, cells, float(allowance[c]), max_support) for c in range(cells)]
    while active := [tree for tree in trees if not tree.finished]:
        batches = [tree.take() for tree in active]
        for tree, growth in zip(active, network.grow(active, batches), strict=True):
            tree.add(growth)
    return [tree.texts(log_root[:, c]) for c, tree in enumerate(trees)]


class Tree:
    """The token tree of one plate element.

    Invariant: mass of all roots = finished texts + waiting nodes + pruned mass (+ dead ends of a constraint).  A node's
    tokens are those of its parent in the pool of expanded nodes, and one more (PAD for a root).
    """

    def __init__(
        self, network: Next, log_root: Tensor, cell: int, cells: int, allowance: float, max_support: int
    ) -> None:
        self.network, self.log_root, self.cell, self.cells = network, log_root, cell, cells
        self.allowance, self.max_support = allowance, max_support
        self.capacity = max(4 * max_support, TUNING.waiting // cells)
        # Of nodes below the floor only the mass is kept.  The floor is lowered if these nodes turn out to be needed.
        self.floor = math.log(allowance) + math.log(TUNING.least) if allowance > 0 else -math.inf
        self.capped = False
        self._start()

    def _start(self) -> None:
        device = self.log_root.device
        roots = (self.log_root > -torch.inf).nonzero()[:, 0]
        self.row = roots * self.cells + self.cell  # (E,) pool: the row of the batch that each expanded node continues
        self.prefix = torch.full((len(roots), self.network.limit), text.PAD, device=device)  # (E, W)
        self.depth = torch.zeros_like(roots)
        self.state = torch.zeros_like(roots)  # (E,) of the stop strings
        self.waiting = Growth(
            *(torch.empty(0, dtype=d, device=device) for d in (torch.long, torch.long, torch.float64))
        )
        self.done: list[Growth] = []
        self.pruned, self.expanded, self.full = 0.0, 0, False
        seeds = Growth(torch.arange(len(roots), device=device), torch.full_like(roots, text.PAD), self.log_root[roots])
        self.add(seeds)

    @property
    def finished(self) -> bool:
        """Whether the rest is within the allowance, or `max_support` texts are more probable than every node."""
        log_p = self.waiting.log_p
        if not len(log_p) or self.full:
            return True
        left = float(log_p.exp().sum()) + self.pruned
        if left <= self.allowance:
            return True
        best = log_p.max()
        return sum(int((d.log_p >= best).sum()) for d in self.done) >= self.max_support

    def take(self) -> Growth:
        """Removes the most probable waiting nodes: those that the allowance cannot cover, at least 64."""
        log_p, order = self.waiting.log_p.sort(descending=True)
        if self.allowance > 0:
            beyond = log_p.exp().flip(0).cumsum(0).flip(0) + self.pruned  # the mass of this node and all after it
            needed = max(int((beyond > 0.5 * self.allowance).sum()), 64)
        else:
            needed = max(self.max_support // 4, 64)
        n = min(needed, TUNING.nodes, len(order))
        nodes = Growth(*(x[order[:n]] for x in self.waiting))
        self.waiting = Growth(*(x[order[n:]] for x in self.waiting))
        return nodes

    def expand(self, nodes: Growth) -> Tensor:
        """Moves nodes to the pool; returns their indices there."""
        prefix, depth = self.prefix[nodes.parent], self.depth[nodes.parent]
        grown = (nodes.token != text.PAD).nonzero()[:, 0]
        prefix[grown, depth[grown]] = nodes.token[grown]
        depth[grown] += 1
        first = len(self.row)
        self.expanded += len(nodes.token)
        self.row = torch.cat([self.row, self.row[nodes.parent]])
        self.state = torch.cat([self.state, self.network.state(self.state[nodes.parent], nodes.token)])
        self.prefix, self.depth = torch.cat([self.prefix, prefix]), torch.cat([self.depth, depth])
        return torch.arange(first, len(self.row), device=prefix.device)

    def add(self, growth: Growth) -> None:
        """Adds children, as finished texts or as waiting nodes."""
        depth = self.depth[growth.parent] + (growth.token != text.PAD)
        state = self.network.state(self.state[growth.parent], growth.token)
        over = self.network.is_over(self.row[growth.parent], growth.token, depth, state)
        self.done.append(Growth(*(x[over] for x in growth)))
        self.waiting = Growth(*(torch.cat([a, b[~over]]) for a, b in zip(self.waiting, growth, strict=True)))
        self.full = self.expanded > max(8 * self.max_support, TUNING.expansions)
        if len(self.waiting.log_p) > self.capacity:
            self._forget()
        elif self.pruned > 0.25 * self.allowance > 0 and not self.capped:
            self.floor -= math.log(256)
            self._start()

    def _forget(self) -> None:
        """Drops the less probable half of the waiting nodes for good, to save memory; their mass is kept."""
        log_p, order = self.waiting.log_p.sort(descending=True)
        kept = self.capacity // 2
        self.pruned += float(log_p[kept:].exp().sum())
        self.floor, self.capped = max(self.floor, float(log_p[kept - 1])), True
        self.waiting = Growth(*(x[order[:kept]] for x in self.waiting))

    def texts(self, log_root: Tensor) -> Texts:
        """The finished texts, the most probable first: as many as the allowance needs, at most `max_support`."""
        done = Growth(*(torch.cat(parts) for parts in zip(*self.done, strict=True)))
        left = float(self.waiting.log_p.exp().sum()) + self.pruned
        kept, left = most_probable(done.log_p, self.allowance, self.max_support, left)
        parent, token = done.parent[kept], done.token[kept]
        root = self.row[parent] // self.cells
        value = torch.nn.functional.pad(self.prefix[parent], (0, 2), value=text.PAD)  # room for token and stop
        at = self.depth[parent]
        value.scatter_(1, at[:, None], token[:, None])
        at = at + (token != text.PAD)
        value = self.network.with_stop(value, token, at, self.network.state(self.state[parent], token))
        joint = done.log_p[kept]
        return Texts(root, text.pad(value, self.network.width), joint - log_root[root], joint, left)


class Next:
    """The next-token probabilities of a text distribution, for many prefixes at once."""

    certain_stop = False  # whether the stop after the last token is certain, so that the network is not needed

    def __init__(self, site: Site):
        self.site = site
        self.stop, self.strings = site.stops
        self.width, self.vocab_size = site.width, site.fn.vocab_size
        self.max_tokens = site.max_tokens.expand(site.shape).flatten()
        self.limit = int(self.max_tokens.max())  # the length of the longest prefix

    @abstractmethod
    def log_probs(self, row: Tensor, prefix: Tensor, depth: Tensor) -> Tensor:
        """log p(v | prefix) of each node and token v, (n, V) in double precision; ``row`` is in the flattened batch."""

    def state(self, before: Tensor, token: Tensor) -> Tensor:
        """The states of the stop strings after one more token."""
        return before if self.strings is None else self.strings.after(before, token)

    def is_over(self, row: Tensor, token: Tensor, depth: Tensor, state: Tensor) -> Tensor:
        """Whether texts of ``depth`` tokens whose last is ``token`` are finished."""
        over = torch.isin(token, self.stop) if self.stop.numel() else torch.zeros_like(token, dtype=torch.bool)
        if self.certain_stop or not self.stop.numel():
            over = over | (depth >= self.max_tokens[row])
        return over if self.strings is None else over | self.strings.final[state]

    def with_stop(self, value: Tensor, last: Tensor, length: Tensor, state: Tensor) -> Tensor:
        """Texts with the certain stop appended where it is missing."""
        if self.certain_stop:
            open_ended = last != self.stop[0]
            short = (open_ended if self.strings is None else open_ended & ~self.strings.final[state]).nonzero()[:, 0]
            value[short, length[short]] = self.stop[0]
        return value

    def grow(self, trees: list[Tree], batches: list[Growth]) -> list[Growth]:
        """The children of a batch of nodes of each tree; children below a tree's floor are pruned."""
        pools = [tree.expand(nodes) for tree, nodes in zip(trees, batches, strict=True)]
        sizes = [len(pool) for pool in pools]
        row = torch.cat([tree.row[pool] for tree, pool in zip(trees, pools, strict=True)])
        prefix = torch.cat([tree.prefix[pool] for tree, pool in zip(trees, pools, strict=True)])
        depth = torch.cat([tree.depth[pool] for tree, pool in zip(trees, pools, strict=True)])
        log_p = torch.cat([nodes.log_p for nodes in batches])
        floor = torch.cat([log_p.new_full((n,), tree.floor) for n, tree in zip(sizes, trees, strict=True)])
        # The nodes of one tree share their prompt in a pass; few nodes are cheaper in one pass for all trees.
        groups = [len(row)] if len(row) <= TUNING.pooled else sizes
        found, lost, first = [], torch.zeros_like(log_p), 0
        for size in groups:
            for at in torch.arange(first, first + size, device=row.device).split(
                max(1, TUNING.children // self.vocab_size)
            ):
                children = log_p[at, None] + self.log_probs(row[at], prefix[at], depth[at])  # (n, V)
                keep = children >= floor[at, None]
                keep &= children > -torch.inf
                lost[at] = children.exp().masked_fill(keep, 0.0).sum(1)
                node, token = keep.nonzero().unbind(1)
                found.append(Growth(at[node], token, children[node, token]))
            first += size
        every = Growth(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        growths, first = [], 0
        for tree, pool, size in zip(trees, pools, sizes, strict=True):
            tree.pruned += float(lost[first : first + size].sum())
            lower, upper = torch.searchsorted(every.parent, torch.tensor([first, first + size], device=row.device))
            parent, token, joint = (x[lower:upper] for x in every)
            growths.append(Growth(pool[parent - first], token, joint))
            first += size
        return growths


class Network(Next):
    """Next-token probabilities of a `Completion`, many prefixes in one pass."""

    def __init__(self, site: Site):
        super().__init__(site)
        fn = site.fn
        self.lm, self.rules = fn.lm, fn.rules(site.shape)
        batch = fn.prompt.shape[:-1]
        prompts = fn.prompt.reshape(batch.numel(), fn.prompt.shape[-1])
        # An empty prompt gets its bos here, because with a prefix after it, it would not look empty.
        self.prompts = prompts if self.lm.adds_bos else with_bos(self.lm, prompts)
        # The prompt that each row of the flattened batch continues.
        self.prompt = torch.arange(batch.numel(), device=fn.prompt.device).view(batch).expand(site.shape).flatten()
        # A single stop without a constraint is certain after the last token.
        self.certain_stop = self.stop.numel() == 1 and self.rules.allowed is None

    def log_probs(self, row: Tensor, prefix: Tensor, depth: Tensor) -> Tensor:
        depth, order = depth.sort(stable=True)  # so that passes hold texts of one length
        row, prefix = row[order], prefix[order]
        context = text.cat(self.prompts[self.prompt[row]], prefix)
        next_token = context.new_zeros(1)  # a placeholder for the next token; its value is not used

        def head(logits: Tensor, rows: Tensor) -> Tensor:
            own = logits[:, 0]  # (r, V)
            result = torch.empty_like(own, dtype=torch.float64)
            for t in depth[rows].unique().tolist():
                these = (depth[rows] == t).nonzero()[:, 0]
                nodes = rows[these]
                rules = self.rules.select(row[nodes])
                result[these] = rules.log_probs(own[these, None], prefix[nodes], t)[:, 0].double()
            return result

        with torch.no_grad():
            log_probs = score(self.lm, context, next_token, head)
        refuse_nan(log_probs)
        return torch.empty_like(log_probs).index_copy_(0, order, log_probs)


class Stepped(Next):
    """Next-token probabilities of any other text that is drawn token by token."""

    def log_probs(self, row: Tensor, prefix: Tensor, depth: Tensor) -> Tensor:
        result = torch.empty(len(row), self.vocab_size, dtype=torch.float64, device=prefix.device)
        for t in depth.unique().tolist():
            nodes = (depth == t).nonzero()[:, 0]
            steps = self.site.steps()
            steps.select(row[nodes])
            for token in prefix[nodes, :t].unbind(1):
                steps.append(token)
            result[nodes] = next_log_probs(steps, self.vocab_size).double()
        refuse_nan(result)
        return result


def most_probable(log_p: Tensor, allowance: float, max_support: int, left: float = 0.0) -> tuple[Tensor, float]:
    """Indices of the fewest entries that leave out at most ``allowance``, most probable first, and the mass left out.

    ``left`` is mass that is left out already.
    """
    order = log_p.argsort(descending=True, stable=True)
    p = log_p[order].exp()
    n = len(order)
    if allowance > 0:
        beyond = p.flip(0).cumsum(0).flip(0) + left  # the mass left out if the list ended before this entry
        n = max(int((beyond > allowance).sum()), 1)
    n = min(n, max_support)
    return order[:n], left + float(p[n:].sum())
