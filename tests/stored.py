"""What a replay buffer holds, and the log joint that it should hold."""

from __future__ import annotations

import torch
from tasks import Task

from lmppl.distributions import Completion
from lmppl.inference import Replay


class Problem(Task):
    """The task with observations whose texts share tokens."""

    def __init__(self, **kwargs):
        super().__init__(x=["abc", "b"], y=["cab", "ca"], **kwargs)


def contents(replay: Replay) -> list[dict]:
    return [{t: e.log_p for t, e in entries.items()} for entries in replay._stored.values()]


@torch.no_grad()
def log_joint(problem: Problem, tokens: tuple, i: int) -> float:
    """log p(z, y_i) of stored tokens (text and its closing -1)."""
    z = torch.tensor(tokens[:-1])
    x, y = (a[i] for a in problem.args)
    p = Completion(problem.lm, x, max_tokens=2).log_prob(z)
    return float(p + Completion(problem.lm, problem.lm.join(x, z), max_tokens=4).log_prob(y))
