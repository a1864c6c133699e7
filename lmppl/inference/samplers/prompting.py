"""Prompting: the answer of a language model that was asked, and not trained."""

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
    r"""Draws of a guide as they are, all of the same weight: what a prompted language model answers.

    .. math:: z_n \sim q, \qquad w_n = \tfrac1N

    The guide is a Pyro program that puts the question into a prompt; the model is never asked, so that there is no
    estimate of the evidence (NaN), and the effective sample size, N, says nothing about the posterior.  A guide that
    was trained may be asked in this way too.

    :param model: a Pyro program.
    :param guide: another, with the model's latent sites.
    :param num_particles: N.
    :param weighted: weigh the draws by the model after all, which is `Importance`.
    :param max_plate_nesting: guessed where not given.

    ``run(*args)`` raises SiteMismatch where model and guide do not fit.

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
        """The program that answers."""
        return self.guide

    @torch.no_grad()
    def run(self, *args: Any, num_particles: int | None = None, **kwargs: Any) -> Posterior:
        """The particles for these arguments."""
        n = self.num_particles if num_particles is None else num_particles
        at_least(1, num_particles=n)
        if self.weighted:
            nesting = self.max_plate_nesting
            return Importance(self.model, self.guide, n, max_plate_nesting=nesting).run(*args, **kwargs)
        # The model's plates say which draws belong together; its densities are not asked for.
        query = Query(self.model, self.guide, args, kwargs, self.max_plate_nesting)
        pair = query.run(Draw(), particles=n).matched()
        drawn, plates = pair.proposal, pair.plates(subsampling=True)
        device = next((node["value"].device for node in programs.latents(drawn).values()), None)
        log_weights = torch.full((n, *plates.sizes), -math.log(n), device=device)
        posterior = Posterior.of(drawn, plates, log_weights, query)
        return replace(posterior, log_evidence=torch.full_like(log_weights[0], torch.nan))


def few_shot(template: str, examples: Sequence[tuple[Mapping[str, str], str]], separator: str = "\n\n") -> str:
    """The template of a question that follows its like, each answered.

    :param template: as in `LanguageModel.fill`, ending where the answer begins.
    :param examples: pairs (the fields' texts, the answer).
    :param separator: what stands between one and the next.
    :returns: a template with the same fields.
    :raises ValueError: where there is no example, or one that lacks a field.

    Example::

        template = few_shot("{x} ...{y} Middle:", [({"x": "I came.", "y": " I won."}, " I saw.")], separator="\\n")
        lm.fill(template, x=x, y=y)
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
