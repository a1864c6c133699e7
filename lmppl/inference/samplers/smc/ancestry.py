"""Particle ancestry: which particle of SMC descends from which, and a plot of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ....files import new_figure, save_figure
from ...core.arguments import plate_element
from ...posterior.log_weights import effective_sample_size, pareto_khat

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Resampling(NamedTuple):
    """One resampling of SMC: before a token, particle n was replaced by particle ``chosen[n]``.

    `Sequential.ancestry` is a tuple of these.

    :param site: the site that was about to be drawn.
    :param token: the index of its token, from 0; 0 for a site that is no text.
    :param chosen: particle indices, (N, *plates); ``chosen[n] = n`` in plate elements that were not resampled.
    :param log_scores: the log W psi by which particles were chosen, (N, *plates); with the optimal twist their sum over
        particles already estimates the evidence.
    :param twisted: whether there was a twist psi, so that particles were chosen half by W psi and half by W.

    Example::

        posterior = SMC(model, guide, num_particles=32, ess_threshold=1.0).run(x, y)
        for event in posterior.ancestry:
            print(event.site, event.token, event.resampled)  # which stories were resampled before this token
    """

    site: str
    token: int
    chosen: Tensor
    log_scores: Tensor
    twisted: bool = False

    @property
    def resampled(self) -> Tensor:
        """The plate elements in which particles were resampled, BoolTensor (*plates)."""
        return (self.chosen.diff(dim=0) != 1).any(0) | (self.chosen[0] != 0)


Ancestry: TypeAlias = tuple[Resampling, ...]


def lineages(ancestry: Ancestry) -> Tensor:
    """The ancestor of each final particle before every resampling.

    .. math:: A_R(n) = chosen_R(n), \\qquad A_r(n) = chosen_r(A_{r+1}(n))

    :param ancestry: ``posterior.ancestry`` of a run of `SMC`, with R resamplings.
    :returns: particle indices, (R, N, *plates).  Row r refers to the particles just before resampling r; its distinct
        entries are the ancestors that survive.
    :raises ValueError: if nothing was resampled.

    Example::

        >>> event = Resampling("z", 1, torch.tensor([0, 0, 2]), torch.zeros(3))
        >>> again = Resampling("z", 2, torch.tensor([1, 1, 2]), torch.zeros(3))
        >>> lineages((event, again)).tolist()
        [[0, 0, 2], [1, 1, 2]]
    """
    if not ancestry:
        raise ValueError("ancestry: nothing was resampled, so every particle is its own ancestor")
    line, rows = None, []
    for event in reversed(ancestry):
        line = event.chosen if line is None else event.chosen.gather(0, line)
        rows.append(line)
    return torch.stack(rows[::-1])


def survivors(ancestry: Ancestry) -> Tensor:
    r"""The number of particles before each resampling that have a descendant at the end.

    .. math:: |\{A_r(n) : n = 1, \dots, N\}|

    with A as in `lineages`.

    :param ancestry: ``posterior.ancestry`` of a run of `SMC`, with R resamplings.
    :returns: counts, (R, *plates).
    :raises ValueError: if nothing was resampled.

    Example::

        >>> event = Resampling("z", 1, torch.tensor([0, 0, 2]), torch.zeros(3))
        >>> survivors((event,)).tolist()  # particles 0 and 2
        [2]
    """
    ordered, _ = lineages(ancestry).sort(1)
    return 1 + (ordered.diff(dim=1) != 0).sum(1)


def ess_of_scores(ancestry: Ancestry) -> Tensor:
    r"""The effective sample size of the scores at each resampling, (R, *plates); inf if nothing was resampled there.

    .. math:: (\sum_n W^n \psi^n)^2 / \sum_n (W^n \psi^n)^2
    """
    return torch.stack([effective_sample_size(e.log_scores).masked_fill(~e.resampled, torch.inf) for e in ancestry])


def khat_of_scores(ancestry: Ancestry) -> Tensor:
    """Pareto k-hat of the scores at each resampling, (R, *plates); NaN for no resampling or too few particles."""
    rows = []
    for event in ancestry:
        scores, resampled = event.log_scores.reshape(len(event.log_scores), -1), event.resampled.flatten()
        khat = [pareto_khat(scores[:, i]) if resampled[i] else torch.nan for i in range(len(resampled))]
        rows.append(torch.tensor(khat, device=scores.device).view(event.resampled.shape))
    return torch.stack(rows)


def plot_ancestry(
    ancestry: Ancestry,
    path: str | Path | None = None,
    index: int | tuple[int, ...] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the lines of descent of one plate element.

    Each column has the particles before a resampling; the last column has them at the end.  Lines that lead to a
    particle at the end are bold.

    :param ancestry: ``posterior.ancestry`` of a run of `SMC`.
    :param path: a PNG to write, completely or not at all; None: a notebook shows the figure.
    :param index: a plate element, an integer or a tuple; None: there is only one.
    :param ax: where to draw; None: a new figure.
    :returns: the matplotlib axes.
    :raises ValueError: if nothing was resampled, and for an index that names no element.

    Example::

        posterior = SMC(model, guide, num_particles=32, ess_threshold=1.0).run(x, y)
        plot_ancestry(posterior.ancestry, "ancestry.png", index=0)
    """
    from matplotlib.collections import LineCollection

    line = lineages(ancestry)  # (R, N, *plates)
    at: tuple[int | slice, ...] = (slice(None), *plate_element(index, line.shape[2:]))
    rounds, particles = line.shape[:2]
    if ax is None:
        size = (1.5 + 0.5 * rounds, 1.2 + 0.12 * particles)
        ax = new_figure(path, figsize=size, layout="constrained").subplots()
    for r, event in enumerate(ancestry):
        parent = event.chosen[at].tolist()
        alive = set(range(particles)) if r == rounds - 1 else set(line[r + 1][at].tolist())
        for bold in (False, True):
            lines = [[(r, m), (r + 1, n)] for n, m in enumerate(parent) if (n in alive) == bold]
            style = {"colors": "C0", "linewidths": 1.4} if bold else {"colors": "0.8", "linewidths": 0.6}
            ax.add_collection(LineCollection(lines, zorder=1 + bold, **style))
    ax.set_xticks(range(rounds + 1), [*(f"{e.site} {e.token}" for e in ancestry), "end"], rotation=90, fontsize=7)
    ax.set(xlim=(-0.2, rounds + 0.2), ylim=(particles - 0.5, -0.5), xlabel="before token", ylabel="particle")
    ax.spines[["top", "right"]].set_visible(False)
    if path is not None:
        save_figure(ax.figure, path)
    return ax
