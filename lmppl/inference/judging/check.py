"""`check`: the first thing to run on a new model and guide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.poutine import Trace
from pyro.util import get_rng_state, set_rng_state
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..core import programs
from ..core.arguments import at_least
from ..core.impossible import why_impossible
from ..core.programs import Node, Program, SiteMismatch, Substitute
from ..core.query import Pair, Query
from ..core.sites import is_terminable, lm_of, text_of, texts_of
from ..core.validation import AxesError, check_axes
from ..core.weights import Weighted, balance, site_log_prob, text_log_probs, weigh
from ..posterior import Posterior
from ..training.gflownet import PooledVarGrad, VarGrad
from ..training.loop.ownership import Owners

Axes = list[tuple[str, int]]
HARDLY_EVER = 1e-4  # a stop that is less probable than this at every position is reported
MOST_IMPOSSIBLE = 0.75  # a larger share of impossible draws is reported
ON_THE_LEFT = (
    "write the program for axes on the left: index with [..., i], sum with .sum(-1), not .sum(), and build prompts "
    "with lm.join or lm.fill"
)

BRANCHES = (
    "a latent has one value for each particle, which a Python `if`, `int` or `range` cannot use: write all branches, "
    "and mask those that a particle does not take, with poutine.mask(mask=...)"
)
RARE = (
    "soften the factor or improve the guide: mask its texts (allowed=), draw a part of the training draws from such a "
    "guide (exploration=Mixture((Tempered(), 0.5), (Proposal(masked), 0.5))), or put values found by SMC or "
    "MetropolisHastings into a replay buffer (GFlowNet.demonstrate); see docs/constrained.md"
)


@dataclass
class Report:
    """The result of `check`.

    :param problems: each problem with what to do about it.
    :param samples: a few decoded draws of each latent site.
    :param axes: the shape of every site, as (meaning, size) of each axis.
    :param sd_u: the standard deviation of u = log p - log q over particles, (*plates); 0 at the posterior.
    :param ess: the effective sample size of the guide's draws, (*plates).
    :param stop_probabilities: the mean stop probability of each text after 0, 1, ... tokens; NaN if no draw is so long.
    :param gradients: the largest gradient norm of each parameter of the guide; None if no gradient reaches it.
    :param overfit: the variance of u over fixed draws before and after a few steps of training.
    """

    problems: list[str] = field(default_factory=list)
    samples: dict[str, list[str]] = field(default_factory=dict)
    axes: dict[str, Axes] = field(default_factory=dict)
    sd_u: Tensor | None = None
    ess: Tensor | None = None
    stop_probabilities: dict[str, list[float]] = field(default_factory=dict)
    gradients: dict[str, float | None] = field(default_factory=dict)
    overfit: tuple[float, float] | None = None

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def check(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_particles: int = 16,
    steps: int = 20,
    learning_rate: float = 5e-3,
    show: bool = True,
    **kwargs: Any,
) -> Report:
    """Finds mistakes in a model and a guide, and says what to do.  Run it first on every new program.

    It runs both once and trains the guide for a few steps.  It prints and returns sample texts, the shape of every site
    with the meaning of each axis, the standard deviation of u = log p - log q (zero at the posterior), the effective
    sample size, stop probabilities, whether gradients reach the guide's parameters, and whether training reduces the
    variance of u over fixed draws.  Afterwards, parameters, gradients, Pyro's parameter store and all random states are
    as they were before.

    :param model: a Pyro program.
    :param guide: a Pyro program that samples the model's latent sites; None: the model proposes, nothing is trained.
    :param args: the arguments of model and guide, one small batch, and ``kwargs``.
    :param kwargs: their keyword arguments.
    :param num_particles: the number of draws.
    :param steps: the steps of training with Adam; 0: no training.
    :param learning_rate: of Adam.
    :param show: whether to print the report.
    :returns: a report with ``ok``, ``problems`` (each with what to do), ``samples``, ``axes``, ``sd_u``, ``ess``,
        ``stop_probabilities``, ``gradients`` and ``overfit``.
    :raises ValueError: for a learning rate that is not positive, and negative steps.  Errors of the programs are not
        raised; they are problems of the report.

    >>> report = lmppl.check(model, guide, x, y)
    >>> assert report.ok, report.problems
    """
    if not isinstance(learning_rate, float | int) or not learning_rate > 0:
        raise ValueError(f"learning_rate: must be positive, got {learning_rate!r}")
    at_least(0, steps=steps)
    report = Report()
    with _undisturbed(), pyro.validation_enabled(True):
        query = Query(model, guide, args, kwargs)
        weighted = _weigh(report, query, num_particles)
        if weighted is not None:
            _describe(report, query, weighted)
            if _has_evidence(report, weighted) and guide is not None and num_particles > 1:
                _train(report, query, weighted, steps, learning_rate)
    if show:
        render(report, Console())
    return report


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restores the random states and the names in Pyro's parameter store at the end."""
    state = get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    known = set(pyro.get_param_store().keys())
    try:
        yield
    finally:
        set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        for name in set(pyro.get_param_store().keys()) - known:
            del pyro.get_param_store()[name]


def _weigh(report: Report, query: Query, num_particles: int) -> Weighted | None:
    """Particles with their u; None and a problem in the report if the programs fail."""
    try:
        weighted = weigh(query, num_particles)
        check_axes(Pair(query, weighted.guide, weighted.model, num_particles))
        # Run with the prefix axis of the objectives as well, one more on the left; nothing is scored.
        query.trace(query.model, Substitute(weighted.values), particles=num_particles, prefixes=2)
        return weighted
    except SiteMismatch as error:
        report.problems.append(f"{_line(error)}; give model and guide the same latent sites, in the same order")
    except AxesError as error:
        report.problems.append(_line(error))
    except ValueError as error:
        advice = "; load the weights in float32, or train with a smaller step" if "NaN" in str(error) else ""
        shapes = f"; {ON_THE_LEFT}" if "shape" in _line(error).lower() else ""  # Pyro adds the shapes of all sites
        report.problems.append(_line(error) + (advice or (f"; {BRANCHES}" if _branches(error) else shapes)))
    except Exception as error:  # a user's program can raise anything
        advice = f" ({type(error).__name__})"
        if isinstance(error, RuntimeError | IndexError | TypeError):
            advice = f"; {BRANCHES if _branches(error) else ON_THE_LEFT}"
        report.problems.append(f"the programs do not run with {num_particles} particles: {_line(error)}{advice}")
    return None


def _describe(report: Report, query: Query, weighted: Weighted) -> None:
    """Puts sample texts, axes, sd(u) and stop probabilities into the report."""
    posterior = Posterior.of(weighted.guide, weighted.plates, weighted.u - math.log(len(weighted.u)))
    first: tuple[int, ...] = (0,) * len(weighted.plates.sizes)
    for name, value in posterior.samples.items():
        drawn = value[:5].movedim(0, len(first))[first]
        decode = posterior.sites.decoders.get(name)
        report.samples[name] = [str(s) for s in (decode(drawn) if decode else drawn.tolist())]
    run = query.trace(query.model, Substitute(weighted.values), particles=len(weighted.u), prefixes=1)
    for name, node in programs.scored(run).items():
        report.axes[name] = _axes(node, weighted.plates.nesting)
    finite = weighted.u.masked_fill(weighted.u == -torch.inf, torch.nan)
    mean = finite.nanmean(0)
    report.sd_u = ((finite - mean) ** 2).nanmean(0).sqrt()
    report.ess = posterior.ess
    for name, node in programs.latents(weighted.guide).items():
        if is_terminable(node["fn"]):
            _stops(report, name, node)


def _axes(node: Node, nesting: int) -> Axes:
    """A site's shape with the name of each axis."""
    plates = {f.dim: f.name for f in node["cond_indep_stack"] if f.vectorized}
    plates |= {-1 - nesting: "particle", -2 - nesting: "prefix"}
    batch, event = node["fn"].batch_shape, node["fn"].event_shape
    named = [(plates.get(d, "(shared)"), batch[d]) for d in range(-len(batch), 0)]
    site = text_of(node["fn"])
    names = ["event"] * len(event) if site is None else ["(text)"] * site.stacked + ["token"]
    return named + list(zip(names, event, strict=True))


def _stops(report: Report, name: str, node: Node) -> None:
    """The mean stop probability after t tokens, over the draws that have at least t tokens."""
    site, value = texts_of(node), node["value"]
    stopped = site.ending(value).ended
    if not bool(stopped.all()):
        report.problems.append(
            f"site {name!r}: {int((~stopped).sum())} of {stopped.numel()} draws reach a prefix after which the "
            f"constraint allows no token, for instance {site.fn.decode(value[~stopped][0])!r}, and get weight zero; "
            "allow a stop there"
        )
    with torch.no_grad():
        stop = site.prefix_scores(value).stop_log_probs.exp()  # (particle, *plate axes, W)
    end = site.ending(value).at
    column = torch.arange(stop.shape[-1], device=stop.device)
    there = (column <= end[..., None]) & stopped[..., None]
    mean = torch.where(there, stop, torch.nan).flatten(0, -2).nanmean(0)
    report.stop_probabilities[name] = mean.tolist()
    free = there & (column >= site.min_tokens[..., None]) & (column < site.max_tokens[..., None])
    if bool(free.any()) and float(stop[free].max()) < HARDLY_EVER:
        report.problems.append(
            f"site {name!r}: the text never stops by itself (stop probability at most {float(stop[free].max()):.1g} at "
            "every position), so all texts have max_tokens tokens; choose a stop that the language model writes there, "
            "or change the prompt"
        )


def _has_evidence(report: Report, weighted: Weighted) -> bool:
    """Whether each plate element has a particle of positive weight; if not, reports the sites that exclude all."""
    nothing = weighted.u.amax(0) == -torch.inf  # (*plates)
    if not bool(nothing.any()):
        share = float((weighted.u == -torch.inf).double().mean())
        if share > MOST_IMPOSSIBLE:
            report.problems.append(f"{share:.0%} of the draws are impossible under the model; {RARE}")
        return True
    latents = programs.latents(weighted.model)
    before = len(report.problems)
    sites = programs.scored(weighted.model)
    with torch.no_grad():
        known = text_log_probs(sites)
    for name, node in sites.items():
        with torch.no_grad():
            log_p = site_log_prob(node, weighted.plates, known.get(name))[0]
        if bool((log_p.amax(0) == -torch.inf).any()):
            report.problems.append(f"site {name!r}: {_why_impossible(node, name in latents)}")
    if len(report.problems) == before:
        report.problems.append(
            "every particle has probability zero, for different reasons; use more particles or a better guide"
        )
    return False


def _why_impossible(node: Node, latent: bool) -> str:
    site = text_of(node["fn"])
    if latent:
        return (
            "the model gives every value that the guide draws probability zero; make their rules (stop, limits) agree"
        )
    if site is None:
        return f"probability zero under every particle (zero evidence); {RARE}"
    return why_impossible(node) or (
        "probability zero under every particle (zero evidence): allowed= or a tool rules out one of its tokens"
    )


def _train(report: Report, query: Query, weighted: Weighted, steps: int, learning_rate: float) -> None:
    """Measures gradients, and trains for a few steps on fixed draws; then restores everything."""
    model, guide, args, kwargs = query.given
    parameters = _parameters(guide, weighted.guide)
    target = set(Owners.of(query).target)
    if parameters and target.issuperset(map(id, parameters.values())):
        report.problems.append(
            "guide: it has no trainable parameters of its own: its language model is the model's, which training would "
            "change; draw its texts from lm.with_adapter(...), unless you do not train the guide"
        )
        return
    parameters = {name: p for name, p in parameters.items() if id(p) not in target}
    if not parameters:
        report.problems.append(
            "guide: it has no trainable parameters; draw its texts from lm.with_adapter(...), whose adapter trains"
        )
        return
    tensors = list(parameters.values())
    saved, grads = [p.detach().clone() for p in tensors], [p.grad for p in tensors]
    n, nesting = len(weighted.u), weighted.plates.nesting
    norms: list[float | None] = [None] * len(tensors)

    def gradient(loss: Tensor) -> list[Tensor | None]:
        if not loss.requires_grad:
            return [None] * len(tensors)
        found: list[Tensor | None] = list(torch.autograd.grad(loss, tensors, allow_unused=True))
        for i, g in enumerate(found):
            if g is not None:
                norms[i] = max(norms[i] or 0.0, float(g.norm()))
        return found

    def fixed_loss() -> Tensor:
        b = balance(query, weighted.guide, n, None)
        return objective.reduce(objective.residual(b), b).mean()

    objective = VarGrad(num_particles=n, max_plate_nesting=nesting)
    try:
        gradient(
            PooledVarGrad(num_particles=n, max_plate_nesting=nesting).differentiable_loss(model, guide, *args, **kwargs)
        )
        optimizer = torch.optim.Adam(tensors, lr=learning_rate)
        losses = []
        for _ in range(steps):
            loss = fixed_loss()
            losses.append(loss.item())
            for p, g in zip(tensors, gradient(loss), strict=True):
                p.grad = g
            optimizer.step()
        if steps:
            with torch.no_grad():
                losses.append(fixed_loss().item())
            report.overfit = (losses[0], losses[-1])
    except (ValueError, RuntimeError) as error:
        report.problems.append(f"training fails: {_line(error)}")
    finally:
        with torch.no_grad():
            for p, old, grad in zip(tensors, saved, grads, strict=True):
                p.copy_(old)
                p.grad = grad
    report.gradients = dict(zip(parameters, norms, strict=True))
    _judge_training(report)


def _judge_training(report: Report) -> None:
    before, after = report.overfit or (0.0, 0.0)
    if not math.isfinite(before + after):
        report.problems.append("the loss is not finite; look for infinite factors, or lower learning_rate")
        return
    flat = before < 1e-8  # all draws are equal, or the guide is the posterior
    if not any(report.gradients.values()) and not flat:
        report.problems.append(
            "guide: no gradient reaches its trainable parameters; let the guide's texts come from the language model "
            "that owns them (lm.with_adapter(...)), outside torch.no_grad()"
        )
    elif before > 1e-3 and after > 0.9 * before:
        report.problems.append(
            f"one observation cannot be overfitted: the variance of u over fixed draws goes from {before:.3g} to "
            f"{after:.3g}; try another learning_rate or more steps, a larger adapter, or more of its target_modules"
        )


def _parameters(guide: Program, trace: Trace) -> dict[str, Tensor]:
    """The guide's trainable parameters by name: of its language models, of a module, and in Pyro's store."""
    found: dict[str, Tensor] = {}
    for node in programs.scored(trace).values():
        lm = lm_of(node["fn"])
        if lm is not None:
            names = {id(p): name for name, p in lm.model.named_parameters()}
            found |= {names.get(id(p), f"parameter {i}"): p for i, p in enumerate(lm.trainable_parameters())}
    owner = guide if isinstance(guide, torch.nn.Module) else getattr(guide, "__self__", None)
    if isinstance(owner, torch.nn.Module):
        shared = {
            id(p)
            for m in owner.modules()
            if hasattr(m, "trainable_parameters")
            for own in m.modules()
            for p in own.parameters(recurse=False)
        }
        found |= {n: p for n, p in owner.named_parameters() if p.requires_grad and id(p) not in shared}
    found |= {n: node["value"].unconstrained() for n, node in trace.nodes.items() if node["type"] == "param"}
    return {n: p for n, p in found.items() if p.is_leaf}


def render(report: Report, console: Console) -> None:
    """Prints a report."""
    for name, drawn in report.samples.items():
        console.print(f"[bold]{name}[/bold], drawn:")
        for s in drawn:
            console.print(f"  {s!r}", markup=False, highlight=False)
    if report.axes:
        table = Table("site", "shape", title="What each axis means (as the objectives run the model)")
        for name, axes in report.axes.items():
            table.add_row(name, " x ".join(f"{axis} {size}" for axis, size in axes) or "scalar")
        console.print(table)
    if report.sd_u is not None and report.ess is not None:
        sd, ess = float(report.sd_u.double().mean()), float(report.ess.double().mean())
        console.print(f"sd of u = log p - log q: {sd:.3g} (0 at the posterior); effective sample size {ess:.1f}")
    for name, stops in report.stop_probabilities.items():
        shown = "  ".join("-" if math.isnan(p) else f"{p:.2g}" for p in stops)
        console.print(f"probability that {name} stops after 0, 1, ... tokens: {shown}")
    if report.gradients:
        absent = [n for n, g in report.gradients.items() if not g]
        console.print(f"gradients reach {len(report.gradients) - len(absent)} of {len(report.gradients)} parameters")
        for name in absent[:5]:
            console.print(f"  none: {name}", markup=False)
    if report.overfit is not None:
        console.print("variance of u over fixed draws: {:.3g} before training, {:.3g} after".format(*report.overfit))
    for problem in report.problems:
        console.print(f"[bold red]problem[/bold red] {_escaped(problem)}")
    if report.ok:
        console.print("[bold green]No problem found.[/bold green]")


def _escaped(problem: str) -> str:
    return problem.replace("[", r"\[")


def _branches(error: Exception) -> bool:
    """Whether the program needed one Python value of a latent that has one for each particle."""
    return any(said in str(error) for said in ("to Scalar", "ambiguous", "only one element"))


def _line(error: Exception) -> str:
    """The first line of a message; Pyro appends the shapes of every site."""
    return str(error).strip().split("\n")[0]
