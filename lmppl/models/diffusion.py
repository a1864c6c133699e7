"""Infilling by unmasking, on the embedded stories or on the user's; the programs are in `programs/diffusion.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from ..distributions.unmasking import LEFT_TO_RIGHT
from ..inference import Enumeration
from ..language_model import LanguageModel
from ..masked_language_model import MaskedLanguageModel
from .experiment import Experiment, Options, Recipe, Start, embedded_splits, split
from .infilling import read_stories
from .programs.diffusion import Diffusion

RECIPE = Recipe(observations=4, particles=8)  # a step reads each text once for each word to fill


def experiment(
    lm: MaskedLanguageModel | None = None,
    data: str | Path | None = None,
    *,
    order: str = "random",
    guide_order: str | None = None,
    reader: LanguageModel | str | None = None,
    **options: Unpack[Options],
) -> Experiment:
    """The missing middle sentence of a story, by a masked language model that unmasks it word by word.

    It runs on the embedded masked story LM, or on ``lm`` with the stories of the file ``data``.  From left to right
    each text has one path, and the exact posterior can be enumerated; for other orders see `text_log_joint`.

    :param lm: a masked language model; None: the embedded one.
    :param data: a text file with a story of three sentences in each line; None: the embedded stories.
    :param order: the order of the model's unmasking: "random", "left-to-right", "confidence" or "learned".
    :param guide_order: the order of the guide's; None: as ``order``.
    :param reader: a causal language model, or the name of a checkpoint, that reads the end; None: the embedded one.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another language model without ``data`` and ``reader``.
    """
    needs = "stories of its own, a file with one story per line"
    start = Start.of("diffusion", "masked_stories", lm, data, RECIPE, needs, kind=MaskedLanguageModel, **options)
    if reader is None and data is not None:
        raise ValueError("reader: stories of your own need a causal language model that reads their ends")
    if not isinstance(reader, LanguageModel):
        device = start.lm.device
        read = LanguageModel.embedded if reader is None else LanguageModel.from_pretrained
        reader = read(reader or "stories", device=device)
    task = Diffusion(start.lm, reader, start.guide_lm, order=order, guide_order=guide_order or order)
    stories = embedded_splits("stories") if data is None else split(read_stories(data))
    return start.experiment(
        task,
        stories,
        lambda s: f"{s.x} [...]{s.y}    (told: {s.z.strip()})",
        exact=Enumeration(task.model, mass=0.998) if data is None and order == LEFT_TO_RIGHT else None,
    )


@torch.no_grad()
def text_log_joint(task: Diffusion, x: Tensor, y: Tensor, middles: Tensor) -> Tensor:
    r"""log p(z, y | x) of texts z, summed over the paths that write them: middles (K, B, n) -> (K, B).

    .. math:: p(z, y \mid x) = p_{reader}(y \mid x, z) \sum_\sigma p(z, \sigma \mid x)

    The sum over orders is that of `Unmasking.text_log_prob`.  The softmax over all possible middles is the exact
    posterior of the text.
    """
    prior = task.prior(x)
    paths = prior.symbols(torch.arange(middles.shape[-1], device=middles.device), middles)
    log_y = task.ending(prior.fill(paths), y).log_prob(task.read(y))
    return prior.text_log_prob(middles) + log_y
