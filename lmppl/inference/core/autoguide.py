"""`AutoGuide`: a guide made from a model, whose texts are written by the model's language model with an adapter."""

from __future__ import annotations

import inspect
import os
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ... import text
from ...distributions import Completion
from ...language_model import LanguageModel
from . import programs
from .programs import Node, Program, Sketch
from .sites import around, innermost, is_text

Template = str | Sequence[Mapping[str, str]]
"""A prompt's template: a string with fields, or chat messages with fields in their contents."""


class AutoGuide:
    r"""A guide made from a model: the model without its observations, with an adapter that writes the latent texts.

    .. math:: q(z \mid observed) = \prod_s LM_\phi(z_s \mid \text{template}_s(observed, z_{<s}))

    Plates and masks are those of the model, and so are the limits, stops, constraints and temperatures of its texts.
    All texts of one base model share one adapter.  Latent sites that are no texts are drawn from the model's prior,
    unless ``ordinary`` draws them.  Called with the model's arguments, the guide returns the latent values by site.
    Building it runs no network.  Each call runs the model's code, with any network that the code itself calls, for
    instance to compute a factor.

    :param model: a Pyro program.
    :param peft_config: the configuration of a new adapter, the path of a saved one, or a `LanguageModel` with an
        adapter that is shared with something else.
    :param template: the prompt of every latent text.  A string, whose fields name arguments of the model (texts or
        strings), observed texts, or latent texts that come earlier in the program.  Or a list of chat messages whose
        contents are such strings, for `LanguageModel.chat`.  Or a dict of either by site.  None: the observed texts in
        program order, then the site's own prompt, one per line; the text continues this prompt, as in the model.
        Observations that are no texts are not shown.
    :param args: example arguments of the model, to find its language models at once; None: they are found in the first
        call.
    :param kwargs: example keyword arguments, likewise.
    :param lm: the base language model, if there are no example arguments.
    :param ordinary: a Pyro program, called with the model's arguments, that draws the latent sites that are no texts.
    :param separator: the string between the parts of the default prompt.
    :param name: the prefix of the parameters' names in Pyro's store, where `pyro.infer.SVI` finds them.

    :raises ValueError: when called, for a field of the template that names nothing or no text, and for a text whose
        base model has no adapter.

    Example::

        guide = AutoGuide(model, LoraConfig(r=16, target_modules="all-linear"), "{y}\n{x}", args=(x, y))
        optimizer = torch.optim.AdamW(guide.trainable_parameters(), lr=1e-3)
        gflownet = GFlowNet(model, guide, optimizer=optimizer)
        gflownet.fit(batches, 100, progress=False)
    """

    def __init__(
        self,
        model: Program,
        peft_config: peft.PeftConfig | str | os.PathLike[str] | LanguageModel,
        template: Template | Mapping[str, Template] | None = None,
        *,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        lm: LanguageModel | None = None,
        ordinary: Program | None = None,
        separator: str = "\n",
        name: str = "guide",
    ):
        self.model, self.peft_config, self.template = model, peft_config, template
        self.ordinary, self.separator, self.name = ordinary, separator, name
        self._views: dict[int, LanguageModel] = {}  # by network
        self._sites: dict[str, LanguageModel] = {}
        if isinstance(peft_config, LanguageModel):
            self._views[id(peft_config.network)] = peft_config
        elif lm is not None:
            self._view(lm)
        self._complete = bool(self._views)
        if args is not None or kwargs is not None:
            (sketch,) = programs.sketches([model], args or (), kwargs or {})
            for site, node in programs.latents(sketch).items():
                if _is_written(node):
                    self._sites[site] = self._view(innermost(node["fn"]).lm)
            self._complete = True

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of the adapters, for an optimiser.

        :raises ValueError: if the language models are not known yet: give ``args`` or ``lm``, or call the guide once.
        """
        if not self._views:
            raise ValueError("args: the model's language models are not known yet; pass args=, lm=, or call it once")
        return [p for view in self._views.values() for p in view.trainable_parameters()]

    def lm(self, site: str) -> LanguageModel:
        """The language model, with its adapter, that writes a latent text.

        :param site: the name of a latent text.
        :raises ValueError: for a site that is no text, or that was not met yet.
        """
        if site not in self._sites:
            raise ValueError(f"site: {site!r} is none of the latent texts met so far, {list(self._sites)}")
        return self._sites[site]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes the adapter in PEFT's layout; several adapters are written into subdirectories "0", "1", ...

        :param directory: the path; as ``peft_config`` it loads what was saved.
        """
        views = list(self._views.values())
        for i, view in enumerate(views):
            view.save_pretrained(directory if len(views) == 1 else Path(directory) / str(i))

    def _view(self, lm: LanguageModel) -> LanguageModel:
        key = id(lm.network)
        if key not in self._views:
            if getattr(self, "_complete", False):
                raise ValueError("lm: a latent text has a base model for which there is no adapter")
            config: Any = self.peft_config
            if isinstance(config, str | os.PathLike) and not (Path(config) / "adapter_config.json").is_file():
                config = Path(config) / str(len(self._views))
            self._views[key] = lm.with_adapter(config)
        return self._views[key]

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self._views and torch.is_grad_enabled():
            self._register()
        given: dict[str, Tensor] = {}
        if self.ordinary is not None:
            given |= programs.values(poutine.trace(self.ordinary).get_trace(*args, **kwargs))
        observed: dict[str, Node] = {}
        if self.template is None or isinstance(self.template, Mapping):
            # Observations may come after the texts, so a first run collects them; both runs use the same subsamples.
            with _Hidden(given), Sketch():
                first = poutine.trace(self.model).get_trace(*args, **kwargs)
            given |= {name: node["value"] for name, node in first.nodes.items() if site_is_subsample(node)}
            observed = {n: s for n, s in programs.scored(first).items() if s["is_observed"] and is_text(s["fn"])}
        writer = _Writer(self, _arguments(self.model, args, kwargs), observed, given)
        with writer:
            self.model(*args, **kwargs)
        self._complete = True
        if isinstance(self.template, Mapping) and (unknown := sorted(set(self.template) - set(self._sites))):
            raise ValueError(f"template: {unknown[0]!r} is none of the latent texts {list(self._sites)}")
        return writer.latents

    def _register(self) -> None:
        """Registers the parameters for `pyro.infer.SVI`; parameters of the same names in Pyro's store are replaced."""
        programs.register(self.name, self.trainable_parameters())


class _Hidden(Messenger):
    """Hides a run's sites, except subsamples without a given value, from handlers outside.

    The random state is left unchanged.
    """

    def __init__(self, given: Mapping[str, Tensor]):
        super().__init__()
        self.given = given

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.given and not msg["is_observed"]:
            msg["value"], msg["done"] = self.given[msg["name"]], True
        if msg["done"] or msg["is_observed"] or not site_is_subsample(msg):
            msg["stop"] = True
        if msg["stop"] and not msg["done"] and msg["value"] is None:
            with torch.random.fork_rng(devices=[]):
                msg["value"], msg["done"] = msg["fn"](*msg["args"], **msg["kwargs"]), True


class _Writer(Messenger):
    """Hides observations, and gives latent texts their distribution in the guide."""

    def __init__(
        self, guide: AutoGuide, fields: dict[str, Any], observed: dict[str, Node], given: Mapping[str, Tensor]
    ):
        super().__init__()
        self.guide, self.fields, self.observed, self.given = guide, fields, observed, given
        self.latents: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            msg["stop"] = True
        elif msg["name"] in self.given:
            msg["value"], msg["done"], msg["stop"] = self.given[msg["name"]], True, True
        elif _is_written(msg):
            fn = innermost(msg["fn"])
            lm = self.guide._sites[msg["name"]] = self.guide._view(fn.lm)
            msg["fn"] = around(msg["fn"], fn.after(self._prompt(msg, lm), lm).expand(fn.batch_shape))

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.fields[msg["name"]] = msg["value"]
            if not msg["is_observed"]:
                self.latents[msg["name"]] = msg["value"]

    def _prompt(self, msg: Any, lm: LanguageModel) -> Tensor:
        template = self.guide.template
        template = template.get(msg["name"]) if isinstance(template, Mapping) else template
        if template is None:
            parts: list[Any] = []
            for node in self.observed.values():
                parts += [_beside(node, msg), self.guide.separator]
            return lm.join(*parts, _without_bos(lm, innermost(msg["fn"]).prompt))
        if isinstance(template, str):
            return lm.fill(template, **self._fields(template, lm))
        return lm.chat([{**message, "content": self._content(message["content"], lm)} for message in template])

    def _content(self, template: str, lm: LanguageModel) -> Tensor | str:
        """A message's content: a string if it has no fields, else a text."""
        fields = self._fields(template, lm)
        return lm.fill(template, **fields) if fields else template.format()

    def _fields(self, template: str, lm: LanguageModel) -> dict[str, Tensor]:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        return {name: self._field(name, lm) for name in names}

    def _field(self, name: str, lm: LanguageModel) -> Tensor:
        if name not in self.fields:
            raise ValueError(
                f"template: {name!r} is neither an argument of the model nor a site before this one; expected one of "
                f"{sorted(self.fields)}"
            )
        value = self.fields[name]
        if isinstance(value, str | list | tuple):
            return lm.encode(value)
        if not isinstance(value, Tensor) or value.dtype != torch.long or not value.dim():
            raise ValueError(f"template: expected a text in the field {name!r}, got {type(value).__name__}")
        return value


def _without_bos(lm: LanguageModel, prompt: Tensor) -> Tensor:
    """A prompt without its bos, for use after other text."""
    if not lm.adds_bos or not prompt.shape[-1]:
        return prompt
    first = torch.arange(prompt.shape[-1], device=prompt.device) == 0
    return prompt.masked_fill(first & (prompt == lm.bos_id), text.PAD)


def _is_written(node: Any) -> bool:
    """Whether a site is a `Completion`, which a language model writes after a prompt."""
    return isinstance(innermost(node["fn"]), Completion)


def _beside(node: Node, msg: Any) -> Tensor:
    """An observed text for a latent site's prompt: joined over the plates in which only the observation is."""
    value, own = node["value"], {f.name for f in msg["cond_indep_stack"]}
    for frame in node["cond_indep_stack"]:
        axis = value.dim() - node["fn"].event_dim + (frame.dim or 0)
        if frame.vectorized and frame.name not in own and axis >= 0:
            value = text.cat(*value.split(1, axis))
    for _ in range(msg["fn"].event_dim - node["fn"].event_dim):  # the same text for all texts of the site's event
        value = value[..., None, :]
    return value


def _arguments(model: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        variadic = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        found |= value if variadic else {name: value}
    return found
