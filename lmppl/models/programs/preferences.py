"""Preferences: people of several kinds choose between texts; the target is a mixture of what each kind would read.

Who they are, from choices y:   s ~ shares,   g_k ~ tastes,   y_a ~ sum_k s_k prod_j Bernoulli(sigmoid(d_aj . w[g_k]))
What one of them would read:    z ~ LM(x), times e^(beta w . phi(z)),    for a taste w

Wanted for the next person, of unknown kind:  sum_g m_g p_g(z | x),   m the posterior of that person's taste
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import comb, factorial, prod

import pyro
import torch
from pyro.distributions import Bernoulli, Categorical, MaskedDistribution, MixtureSameFamily
from torch import Tensor

from ... import text
from ...constraints import Constraint
from ...distributions import Completion
from ...inference import Posterior
from ...language_model import LanguageModel

TEMPLATE = "For a reader who likes{w}:\n{x}"
LONGEST = 30  # tokens of a text


class Annotators:
    r"""People of K kinds, whose choices between two texts are observed: a program of ordinary discrete latents.

    .. math:: s \sim \text{shares}, \quad g_k \sim \text{tastes}, \quad
              y_a \sim \sum_k s_k \prod_j \mathrm{Bernoulli}(\sigma(w_{g_k} \cdot d_{aj})),
              \qquad d = \phi(z) - \phi(z')

    :math:`y_{aj}` is 1 where annotator a chose z of the pair (z, z').  A kind is a Bradley-Terry utility
    :math:`u(z) = w \cdot \phi(z)`, in nats.  The kind of each annotator is summed out, so that the latents are few and
    discrete, and `Enumeration` is exact.  The shares are multiples of 1 / ``parts``, none of them zero, uniform on that
    grid of the simplex.  Kinds are ordered by their shares, the largest first.  Two kinds may have the same taste, so
    that K is the largest number of different kinds.

    :param tastes: (G, F), the utilities that a kind may have, equally probable a priori.
    :param kinds: K, the most kinds.
    :param parts: the number of parts that the shares divide, at least K.
    :raises ValueError: for tastes that are not a matrix of finite numbers, and fewer parts than kinds; in a run, for d
        and y of other shapes or values.

    `model(d, y)` is a Pyro program over differences of features d (A, J, F) and choices y (A, J): 1, 0, or -1 for none.
    Its latent sites are "shares", the number of a row of ``shares`` (S, K), and "kind 0" to "kind K-1", each the number
    of a row of ``tastes``.

    Example::

        annotators = Annotators(one_of_each([2], strength=3.0), kinds=2)  # like the first property, the second, or none
        d = torch.tensor([[[1.0, -1.0]], [[1.0, -1.0]], [[-1.0, 1.0]]])  # one pair each of three people
        y = torch.ones(3, 1)
        posterior = Enumeration(annotators.model).run(d, y)
        annotators.next_taste(posterior)  # (3,)
    """

    def __init__(self, tastes: Tensor, *, kinds: int = 3, parts: int = 10):
        if tastes.dim() != 2 or not len(tastes):
            raise ValueError(f"tastes: expected a matrix (G, F), got the shape {tuple(tastes.shape)}")
        if not tastes.is_floating_point() or not bool(tastes.isfinite().all()):
            raise ValueError("tastes: expected finite floating-point numbers")
        if not 1 <= kinds <= parts:
            raise ValueError(f"kinds, parts: expected 1 <= kinds <= parts, got {kinds} and {parts}")
        found = list(divisions(parts, kinds, parts))
        orders = [factorial(kinds) / prod(map(factorial, Counter(s).values())) for s in found]  # of these parts
        self.tastes, self.kinds = tastes, kinds
        self.shares = tastes.new_tensor(found) / parts  # (S, K)
        self.log_shares = (tastes.new_tensor(orders) / comb(parts - 1, kinds - 1)).log()

    @property
    def combinations(self) -> int:
        """The number of values of all latents together, S G^K."""
        return len(self.shares) * len(self.tastes) ** self.kinds

    def model(self, d: Tensor, y: Tensor | None = None) -> Tensor:
        """Shares and kinds, and the choices of all annotators.

        :param d: differences of features, (A, J, F).
        :param y: choices, (A, J): 1, 0, or -1 for none; None: they are drawn.
        :returns: the choices.
        """
        d = self._checked(d, y)
        everyone = torch.zeros_like(self.tastes[:, 0])
        s = pyro.sample("shares", Categorical(logits=self.log_shares))
        kinds = [pyro.sample(f"kind {k}", Categorical(logits=everyone)) for k in range(self.kinds)]
        w = self.tastes[torch.stack(torch.broadcast_tensors(*kinds), -1)]  # (..., K, F)
        choices = Bernoulli(logits=torch.einsum("...kf,...jf->...kj", w, d))  # (..., A, K, J)
        if y is not None:
            choices = MaskedDistribution(choices, (y >= 0)[:, None])
        choices = choices.to_event(1)
        mixture = Categorical(self.shares[s].expand(*choices.batch_shape))
        with pyro.plate("annotators", len(d)):
            seen = None if y is None else y.clamp(min=0).to(d.dtype)
            return pyro.sample("choices", MixtureSameFamily(mixture, choices), obs=seen)

    def next_taste(self, posterior: Posterior) -> Tensor:
        r"""The probability of each taste of the next person: :math:`m_g = E[\sum_k s_k 1[g_k = g]]`.

        :param posterior: that of `model`.
        :returns: (G,).
        """
        shares, kinds = self._found(posterior)
        m = shares.new_zeros(len(self.tastes))
        return m.index_add(0, kinds.flatten(), (posterior.probabilities[:, None].to(shares.dtype) * shares).flatten())

    def taste_of_each(self, posterior: Posterior, d: Tensor, y: Tensor) -> Tensor:
        """The probability of each taste of each annotator, given all choices.

        :param posterior: that of `model`.
        :param d: differences of features, (A, J, F).
        :param y: choices, (A, J).
        :returns: (A, G).
        """
        d, (shares, kinds) = self._checked(d, y), self._found(posterior)
        utility = torch.einsum("gf,ajf->gaj", self.tastes, d)
        chosen = Bernoulli(logits=utility).log_prob(y.clamp(min=0).to(utility.dtype)).masked_fill(y < 0, 0.0).sum(-1)
        weights = posterior.probabilities.to(shares.dtype)
        top = weights > 0
        of_kind = (chosen[kinds[top]] + shares[top].log()[..., None]).softmax(1) * weights[top, None, None]  # (N, K, A)
        found = shares.new_zeros(len(self.tastes), len(d))
        return found.index_add(0, kinds[top].flatten(), of_kind.flatten(0, 1)).T

    def _checked(self, d: Tensor, y: Tensor | None) -> Tensor:
        """d in the precision of the tastes; refuses shapes that would only broadcast."""
        if d.dim() != 3 or d.shape[-1] != self.tastes.shape[-1]:
            raise ValueError(f"d: expected (A, J, F) with F = {self.tastes.shape[-1]}, got the shape {tuple(d.shape)}")
        if y is not None and y.shape != d.shape[:2]:
            raise ValueError(f"y: expected (A, J) = {tuple(d.shape[:2])}, got the shape {tuple(y.shape)}")
        if y is not None and not bool(((y == 0) | (y == 1) | (y == -1)).all()):
            raise ValueError("y: expected 1, 0, or -1 for no choice")
        return d.to(self.tastes.dtype)

    def _found(self, posterior: Posterior) -> tuple[Tensor, Tensor]:
        """The shares and tastes of the particles, (N, K) each."""
        n = posterior.num_particles
        kinds = [posterior.samples[f"kind {k}"].reshape(n) for k in range(self.kinds)]
        return self.shares[posterior.samples["shares"].reshape(n)], torch.stack(kinds, -1)


class Preferences:
    r"""The model and guide of a text z after a prompt x for a person of utility w.

    .. math:: p_w(z \mid x) = p(z \mid x) \, e^{\beta \, w \cdot \phi(z)} / Z_w(x)

    For tastes of probability m the target is the mixture :math:`\sum_g m_g \, p_g(z \mid x)`: draw a person, then a
    text.  The joint :math:`m_g \, p(z \mid x) \, e^{\beta u_g(z)}` is another distribution: it weights a taste by
    :math:`Z_g`, too, so that tastes which are easy to please count more.  Therefore the taste is an argument here, and
    each taste has its own Z.  One utility :math:`\bar u` for all (the mean, or one fitted to all choices) gives
    :math:`p \, e^{\beta \bar u}`, the target of RLHF.  Fitted to people who disagree, it contains less and less of what
    only a minority likes as :math:`\beta` grows.

    :param lm: the language model p; it is not trained.
    :param guide_lm: the guide's language model, usually ``lm.with_adapter(...)``; None: there is no guide.
    :param properties: for each name the words that give a text this property: :math:`\phi_f(z)` is 1 if z contains one
        of them (upper or lower case), else 0.
    :param beta: :math:`\beta`, how much a nat of utility counts; finite.
    :param names: other names of properties for the guide's prompt, where its language model can hardly distinguish
        theirs; None: there are none.
    :param max_tokens: the most tokens of a text before its stop.
    :param stop: the text's stop, the end of a sentence.
    :param template: the guide's prompt, with the fields x and w, the names of what is liked; without w the guide does
        not know for whom it writes.
    :param allowed: a constraint on the next token, for p and for the guide; None: there is none.
    :raises ValueError: for a beta that is not finite, properties without words, and names of other properties; in a
        run, for utilities that are not one weight for each property.

    `model(x, w)` and `guide(x, w)` are Pyro programs over prompts x (B, L) and utilities w (B, F), with one plate.  The
    latent site is "z", (B, max_tokens + 1).

    Example::

        lm = LanguageModel.embedded("stories")
        q = lm.with_adapter(LoraConfig(r=16, target_modules="all-linear"))
        task = Preferences(lm, q, properties={"old": ["old"], "food": ["egg", "cake"]}, max_tokens=5)
        x, w = lm.encode(["Tom went to the attic."]), torch.tensor([[3.0, 0.0]])  # for somebody who likes old things
        posterior = Importance(task.model, num_particles=64).run(x, w)
        posterior.table("z", 0)
    """

    def __init__(
        self,
        lm: LanguageModel,
        guide_lm: LanguageModel | None = None,
        *,
        properties: Mapping[str, Sequence[str]],
        beta: float = 1.0,
        names: Mapping[str, str] | None = None,
        max_tokens: int = LONGEST,
        stop: str = ".",
        template: str = TEMPLATE,
        allowed: Constraint | None = None,
    ):
        if not abs(beta) < float("inf"):
            raise ValueError(f"beta: expected a finite number, got {beta}")
        self.lm, self.guide_lm, self.beta = lm, guide_lm, beta
        self.properties = words_of(properties)
        if unknown := set(names or ()) - set(properties):
            raise ValueError(f"names: {min(unknown)!r} is not one of the properties {list(properties)}")
        self.names = [(names or {}).get(name, name) for name in properties]
        self.max_tokens, self.stop, self.template, self.allowed = max_tokens, stop, template, allowed

    def model(self, x: Tensor, w: Tensor) -> Tensor:
        """z ~ LM(x), with the factor e^(beta u(z)) of a person's utility.

        :param x: prompts, (B, L).
        :param w: utilities, (B, F).
        :returns: z, (..., B, max_tokens + 1).
        """
        with pyro.plate("people", len(x)):
            z = pyro.sample("z", self.completion(self.lm, x))
            pyro.factor("utility", self.beta * (self.features(z) * self._checked(w)).sum(-1))
            return z

    def guide(self, x: Tensor, w: Tensor) -> Tensor:
        """z ~ q(z | x, w), by a language model that reads what is liked.

        :param x: prompts, (B, L).
        :param w: utilities, (B, F).
        :returns: z, (..., B, max_tokens + 1).
        """
        with pyro.plate("people", len(x)):
            return pyro.sample("z", self.proposal(x, w))

    def proposal(self, x: Tensor, w: Tensor) -> Completion:
        """q(z | x, w), or q(z | x) where the template has no field w.

        :param x: prompts, (B, L).
        :param w: utilities, (B, F).
        :returns: a `Completion`.
        :raises ValueError: where there is no guide.
        """
        if self.guide_lm is None:
            raise ValueError("guide_lm: this Preferences was made without a guide")
        liked = {"w": self.liked(self._checked(w))} if "{w}" in self.template else {}
        return self.completion(self.guide_lm, self.guide_lm.fill(self.template, x=x, **liked))

    def features(self, z: Tensor) -> Tensor:
        """phi: which properties texts have.

        :param z: texts, (..., L).
        :returns: (..., F), 1 or 0.
        """
        return text.map(lambda said: features(said, self.properties), z, self.lm).to(torch.get_default_dtype())

    def liked(self, w: Tensor) -> Tensor:
        """The names of what a person likes, for the prompt.

        :param w: utilities, (B, F).
        :returns: texts (B, L).
        :raises ValueError: for negative weights, and positive weights that differ: the prompt cannot tell how much.
        """
        if w.numel() and not bool(((w == 0) | (w == w.amax())).all() and w.amin() >= 0):
            raise ValueError("w: the guide reads what is liked, not how much; expected zeros and one positive number")
        return self.lm.encode([said([self.names[f] for f in row.nonzero()[:, 0]]) for row in w])

    def _checked(self, w: Tensor) -> Tensor:
        if w.shape[-1:] != (len(self.properties),):
            raise ValueError(f"w: expected (B, F) with F = {len(self.properties)}, got the shape {tuple(w.shape)}")
        return w

    def completion(self, lm: LanguageModel, prompt: Tensor) -> Completion:
        """The distribution of what a language model writes after a prompt.

        :param lm: a language model.
        :param prompt: texts (..., B, L).
        :returns: a `Completion`.
        """
        return Completion(lm, prompt, max_tokens=self.max_tokens, stop=self.stop, allowed=self.allowed)


def divisions(parts: int, kinds: int, largest: int) -> Iterator[tuple[int, ...]]:
    """All ways to divide ``parts`` among ``kinds``, one or more and at most ``largest`` each, the largest first.

    >>> list(divisions(6, 3, 6))
    [(4, 1, 1), (3, 2, 1), (2, 2, 2)]
    """
    if kinds == 0:
        yield from [()] if parts == 0 else []
        return
    for first in range(min(largest, parts - kinds + 1), 0, -1):
        for rest in divisions(parts - first, kinds - 1, first):
            yield first, *rest


def words_of(properties: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The words of properties.

    :raises ValueError: where there are none, and where one is not a single word, so that no text would have it.
    """
    if not properties or not all(properties.values()):
        raise ValueError(f"properties: expected names, each with one word or more, got {properties!r}")
    for name, words in properties.items():
        if isinstance(words, str):
            raise ValueError(f"properties: expected a list of the words of {name!r}, got the string {words!r}")
        if wrong := [word for word in words if not re.fullmatch(r"\w+", word)]:
            raise ValueError(f"properties: {wrong[0]!r} is not one word of letters and digits, so that no text has it")
    return {name: tuple(words) for name, words in properties.items()}


def features(said: str, properties: Mapping[str, Sequence[str]]) -> Tensor:
    """phi of a text, (F,), on the CPU: which properties it has, in upper or lower case.

    >>> features("He took the Old egg.", {"old": ["old"], "food": ["egg", "cake"], "toy": ["ball"]})
    tensor([1., 1., 0.])
    """
    found = set(re.findall(r"\w+", said.casefold()))
    has = [not found.isdisjoint(word.casefold() for word in words) for words in properties.values()]
    return torch.tensor(has, device="cpu").to(torch.get_default_dtype())


def said(names: Sequence[str]) -> str:
    """What is liked, as the guide reads it: each name with its space, and commas between.

    >>> said(["old", "food"]), said([])
    (' old, food', '')
    """
    return ",".join(f" {name}" for name in names)


def one_of_each(groups: Sequence[int], strength: float) -> Tensor:
    """The tastes that like at most one property of each group, for groups of these sizes: (G, F), nats, on the CPU.

    >>> one_of_each([2, 1], 3.0).tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 3.0], [3.0, 0.0, 0.0], [3.0, 0.0, 3.0], [0.0, 3.0, 0.0], [0.0, 3.0, 3.0]]
    """
    parts = [torch.cat([torch.zeros(1, n, device="cpu"), torch.eye(n, device="cpu")]) for n in groups]
    rows = product(*(range(n + 1) for n in groups))
    return strength * torch.stack([torch.cat([p[i] for p, i in zip(parts, row, strict=True)]) for row in rows])
