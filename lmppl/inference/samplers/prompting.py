"""Prompting: the texts that a prompted language model writes, as a baseline without training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..core import programs
from ..core.arguments import at_least, is_program
from ..core.programs import Draw, Program
from ..core.query import Query
from ..posterior.algorithm import Sampler
from ..posterior.posterior import Posterior
from .importance import Importance


class Prompting(Sampler):
    r"""Draws from a guide with equal weights: the answers of a prompted language model, not corrected by the model.

    .. math:: z_n \sim q, \qquad w_n = \tfrac1N

    Use it as a baseline.  The guide is a Pyro program that puts the question into a prompt; it may also be a trained
    one.  The model is not scored: so ``log_evidence`` is NaN, and the effective sample size, which is N, says nothing
    about the posterior.

    :param model: a Pyro program; its plates say which draws belong together.
    :param guide: a Pyro program that samples the model's latent sites.
    :param num_particles: N, the number of draws per plate element.
    :param weighted: whether to weigh the draws by the model, which is `Importance`.
    :param max_plate_nesting: how many batch axes the plates take; None: found from a run without a network.

    ``run(*args)`` passes its arguments to model and guide, and returns a `Posterior`.  It raises SiteMismatch if model
    and guide do not fit together.

    Example::

        def guide(x, y):  # zero-shot; with template=few_shot(template, examples), few-shot
            with pyro.plate("stories", len(x)):
                pyro.sample("z", Completion(lm, lm.fill(template, x=x, y=y), max_tokens=12, stop="."))

        posterior = Prompting(model, guide).run(x, y)
    """

    training_tokens = 0
    guide: Program

    def __init__(
        self,
        model: Program,
        guide: Program,
        num_particles: int = 64,
        *,
        weighted: bool = False,
        max_plate_nesting: int | None = None,
    ):
        is_program(model=model, guide=guide)
        at_least(1, num_particles=num_particles)
        self.model, self.guide, self.num_particles, self.weighted = model, guide, num_particles, weighted
        self.max_plate_nesting = max_plate_nesting

    @property
    def density(self) -> Program:
        """The program that draws: the guide."""
        return self.guide

    @torch.no_grad()
    def run(self, *args: Any, num_particles: int | None = None, **kwargs: Any) -> Posterior:
        """The draws for these arguments of model and guide.

        :param num_particles: N for this call; None: the number given to the constructor.
        """
        n = self.num_particles if num_particles is None else num_particles
        at_least(1, num_particles=n)
        if self.weighted:
            nesting = self.max_plate_nesting
            return Importance(self.model, self.guide, n, max_plate_nesting=nesting).run(*args, **kwargs)
        # The model's plates say which draws belong together; its densities are not computed.
        query = Query(self.model, self.guide, args, kwargs, self.max_plate_nesting)
        pair = query.run(Draw(), particles=n).matched()
        drawn, plates = pair.proposal, pair.plates(subsampling=True)
        device = next((node["value"].device for node in programs.latents(drawn).values()), None)
        log_weights = torch.full((n, *plates.sizes), -math.log(n), device=device)
        posterior = Posterior.of(drawn, plates, log_weights, query)
        return replace(posterior, log_evidence=torch.full_like(log_weights[0], torch.nan))


def few_shot(template: str, examples: Sequence[tuple[Mapping[str, str], str]], separator: str = "\n\n") -> str:
    """A few-shot prompt: answered examples in front of the template of a question.

    :param template: a template for `LanguageModel.fill` that ends where the answer begins.
    :param examples: pairs of (a dict with a string for each field, the answer).
    :param separator: the string after each example.
    :returns: a template with the same fields.
    :raises ValueError: if there is no example, or one that lacks a field.

    Example::

        >>> few_shot("Q: {x} A:", [({"x": "1 + 1?"}, " 2")], separator=" ")
        'Q: 1 + 1? A: 2 Q: {x} A:'
        >>> prompt = lm.fill(few_shot("Q: {x} A:", [({"x": "1 + 1?"}, " 2")]), x=x)
    """
    if not examples:
        raise ValueError("examples: few-shot prompting needs at least one (fields, answer)")
    shots = []
    for fields, answer in examples:
        try:
            shots.append(template.format(**fields) + answer)
        except (KeyError, IndexError) as missing:
            raise ValueError(f"examples: {dict(fields)} lacks the template's field {missing}") from missing
    return "".join(shot.replace("{", "{{").replace("}", "}}") + separator for shot in shots) + template
