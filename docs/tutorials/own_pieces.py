# %% [markdown]
# # Pieces of your own: a distribution, an objective, an algorithm
#
# None of the three needs a change in the package. Inference asks what a piece can do, never of which class it is.
#
# **What we want to know.** Somebody dictates a number, somebody else types it on a keypad: a finger slips to a
# neighbouring key, or misses a key altogether. We see what was typed. What was meant?
#
# The number is a text $z$ of a small language model that ships with the package. What was typed is a text $y$ too,
# and its distribution is one that no library has.

# %%
import math

import matplotlib.pyplot as plt
import pyro
import torch
from peft import LoraConfig
from torch.nn.functional import pad, sigmoid, softplus

from lmppl import LanguageModel
from lmppl.constraints import only
from lmppl.distributions import AutoregressiveText, Completion
from lmppl.inference import (
    Algorithm,
    Divergence,
    Enumeration,
    GFlowNet,
    Objective,
    Posterior,
    Query,
    VarGrad,
    compare,
    weigh,
)
from lmppl.testing import TextContract

torch.set_num_threads(1)
pyro.set_rng_seed(0)
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A distribution
#
# A keypad has rows 123, 456, 789 and 0 below the 8. A finger hits the right key with probability 0.8, one of its
# neighbours with probability 0.15, and else any key. A digit is left out with probability 0.1.

# %%
MISS = 0.1
at = {0: (3, 1)} | {d: ((d - 1) // 3, (d - 1) % 3) for d in range(1, 10)}
near = torch.tensor([[float(math.dist(at[a], at[b]) == 1) for b in range(10)] for a in range(10)])
hits = 0.8 * torch.eye(10) + 0.15 * near / near.sum(1, keepdim=True) + 0.05 / 10  # (meant, typed)

fig, ax = plt.subplots(figsize=(2.6, 3))
for d, (row, column) in at.items():
    ax.text(column, -row, f"{d}\n{hits[5, d]:.3f}", ha="center", va="center", fontsize=9)
    ax.scatter(column, -row, s=1500, marker="s", color="#4477aa", alpha=float(0.06 + 0.8 * hits[5, d]))
ax.set(xlim=(-0.6, 2.6), ylim=(-3.6, 0.6), title="what is hit when 5 is meant")
ax.axis("off")
plt.show()

# %% [markdown]
# `AutoregressiveText` makes a distribution over texts of one function: the logits of the next token, given those
# before. Tokens are 0 for the end and 1 to 10 for the digits. Where "47" was meant and "4" is there, we cannot know
# whether the 7 is still to come or was missed. So the function keeps the probability of every *place*, the number of
# digits that have been dealt with, and sums over it.


# %%
class Typed(AutoregressiveText):
    """What is typed where ``meant`` (..., L) was, tokens 1 to 10 padded with -1."""

    dtype = torch.float

    def __init__(self, meant):
        super().__init__(["", *"0123456789"], meant.shape[:-1], max_tokens=meant.shape[-1], stop=0)
        self.meant = meant.reshape(-1, meant.shape[-1])

    def next_logits(self, prefix, element):  # prefix (R, t): typed so far; element (R,): which of the batch's texts
        meant = self.meant[element]  # (R, L)
        there = meant != -1
        hit = hits.to(self.dtype)[(meant - 1).clamp(min=0)]  # (R, L, 10)
        place = torch.zeros(len(meant), meant.shape[1] + 1, dtype=self.dtype)
        place[:, 0] = 1.0
        for token in prefix.unbind(1):
            struck, _ = strike(place, there)
            as_seen = hit.gather(2, (token - 1)[:, None, None].expand(-1, hit.shape[1], 1))[..., 0]  # (R, L)
            place = pad(struck * as_seen, (1, 0))
        struck, end = strike(place, there)
        return torch.cat([end[:, None], (struck[..., None] * hit).sum(1)], 1).log()  # (R, 11)


def strike(place, there):
    """Which digit is struck next, (R, L), those between being missed; and whether none is, (R,)."""
    struck, waiting = [], torch.zeros_like(place[:, 0])
    for i, digit in enumerate(there.unbind(1)):
        waiting = waiting + place[:, i]
        struck.append(waiting * (1 - MISS) * digit)
        waiting = waiting * torch.where(digit, MISS, 1.0)
    return torch.stack(struck, 1), waiting + place[:, -1]


keys = torch.tensor([[5, 8, -1, -1], [2, 1, 1, -1]])  # "47" and "100"
for meant, drawn in zip(("47", "100"), zip(*Typed(keys).decode(Typed(keys).sample((8,))), strict=True), strict=True):
    print(meant, "->", *drawn)

# %% [markdown]
# **How do we know that it is right?** `TextContract` is the package's own test of a distribution over texts: its
# probabilities add up to one, samples follow them, it gives the same token by token, masks and plates work, and so
# on. A subclass says which distribution. In a project it stands in a test file, and `pytest` finds it.


# %%
class TypedExactly(Typed):
    dtype = torch.double


class TestTyped(TextContract):
    def distribution(self):
        return TypedExactly(keys)


contract = TestTyped()
tests = [name for name in dir(contract) if name.startswith("test_")]
for name in tests:
    getattr(contract, name)(contract.distribution())
    print("passed:", name.removeprefix("test_").replace("_", " "))

# %% [markdown]
# A test that cannot fail proves nothing. Here is a distribution that likes the key 0 a little too well:


# %%
class Wrong(TypedExactly):
    def log_prob(self, value):
        return super().log_prob(value) + 0.1 * (value == 1).sum(-1)  # likes the key 0


try:
    contract.test_normalised(Wrong(keys))
except AssertionError:
    print("refused: its probabilities do not add up to one")
else:
    raise AssertionError("a distribution that is not normalised went through")

# %% [markdown]
# ## The model
#
# The language model writes a number; `Typed` is the distribution of what is typed. It has tokens of its own, so
# `as_keys` translates the digits.

# %%
lm = LanguageModel.embedded("numbers")
PROMPT = "The following is a random integer drawn uniformly between 0 and 100: "
number = dict(min_tokens=1, max_tokens=3, stop=".", allowed=only(lm, [*"0123456789", "."]))
zero = lm.token_id("0")


def as_keys(z):
    return torch.where((z >= zero) & (z < zero + 10), z - zero + 1, -1)


def model(y):
    with pyro.plate("calls", len(y)):
        z = pyro.sample("z", Completion(lm, PROMPT, **number))
        pyro.sample("y", Typed(as_keys(z)), obs=y)


typed = ["47", "5", "100", "88"]
y = torch.full((len(typed), 4), -1)
for row, s in zip(y, typed, strict=True):
    row[: len(s) + 1] = torch.tensor([*(int(d) + 1 for d in s), 0])
exact = Enumeration(model).run(y)
print("meant, where", repr(typed[1]), "was typed:", *(f"{s} {p:.2f}, " for s, p in exact.table("z", 1)[:5]))

# %% [markdown]
# ## An objective
#
# A guide is trained by comparing values of $u = \log p(z, y) - \log q(z)$: it is the posterior where all are equal.
# An objective is a *balance*, which u are compared, and a *divergence*, how. Both can be yours.
#
# **A divergence** is a convex $g$ of a difference of u, and the $f$ it comes from: training descends $E_q f(p/q)$.
# The two belong together by $g'(\log r) = r f'(r) - f(r) + f(1) - f'(1)$. Le Cam's divergence,
# $2 \sum_z (p - q)^2 / (p + q)$, is not in the package. It has $f(r) = 2 (r - 1)^2 / (r + 1)$, and integrating gives
# $g(\delta) = 8 \log(1 + e^\delta) + 8 / (1 + e^\delta) - 2 \delta - 8 \log 2 - 4$. Its slope stays between -2 and 6,
# so that a single odd sample cannot rule a step.


# %%
class LeCam(Divergence):
    def f(self, r):
        return 2 * (r - 1) ** 2 / (r + 1)

    def g(self, delta):
        return 8 * (softplus(delta) + sigmoid(-delta)) - 2 * delta - 8 * math.log(2) - 4


delta = torch.linspace(-4, 4, 81, dtype=torch.double)
r = delta.exp().requires_grad_()
(slope_of_f,) = torch.autograd.grad(LeCam().f(r).sum(), r)
(slope_at_1,) = torch.autograd.grad(LeCam().f(one := torch.ones((), dtype=torch.double, requires_grad=True)), one)
from_f = r * slope_of_f - LeCam().f(r) + LeCam().f(one) - slope_at_1
print(f"largest difference of g' from what f says: {(LeCam().slope(delta) - from_f).abs().max():.1e}")

# %% [markdown]
# **A balance** is a function of all u of one observation. This one compares each sample of the first half with one of
# the second. `u` is (prefix, particle, observations); `uses_prefixes = False` asks for whole texts only.


# %%
class Halves(Objective):
    uses_prefixes = False
    least_particles = 2

    def reduce(self, u, balance):
        half = u.shape[1] // 2
        first, second = slice(half), slice(half, 2 * half)
        both = balance.valid[:, first] & balance.valid[:, second]
        losses = self.divergence.pair(u[:, first] - u[:, second]) * both
        return losses.sum((0, 1)) / both.sum((0, 1)).clamp(min=1)


# %% [markdown]
# Both train the same guide, an adapter of the language model that reads what was typed.


# %%
def trained(objective, steps=150):
    pyro.set_rng_seed(1)
    torch.manual_seed(1)
    q = lm.with_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

    def guide(y):
        seen = torch.where(y > 0, y - 1 + zero, -1)  # in the language model's tokens
        with pyro.plate("calls", len(y)):
            pyro.sample("z", Completion(q, q.join(seen, "|", PROMPT), **number))

    optimizer = torch.optim.AdamW(q.trainable_parameters(), lr=6e-3)
    gflownet = GFlowNet(model, guide, objective, optimizer=optimizer)
    gflownet.fit([(y,)], steps=steps, progress=False)
    return gflownet


guides = {
    "VarGrad, squared": trained(VarGrad()),
    "VarGrad, Le Cam": trained(VarGrad(divergence=LeCam())),
    "halves, Le Cam": trained(Halves(divergence=LeCam())),
}

# %% [markdown]
# ## An algorithm
#
# An algorithm is an object with `model`, `guide` and `run(*args) -> Posterior`. Here is one that is told how good the
# answer has to be, not how many particles to draw. A pilot run estimates how many are needed. Then these are drawn
# anew, so that the evidence stays unbiased. `most` is a limit.
#
# A `Query` is what is asked: two programs and their arguments. `weigh` runs them with N particles and returns u, a
# number for each particle and observation. `Posterior.of` makes the answer.


# %%
class Enough(Algorithm):
    def __init__(self, model, guide=None, ess=300, pilot=200, most=10_000):
        self.model, self.guide = model, guide
        self.ess, self.pilot, self.most = ess, pilot, most

    def weighted(self, query, n):
        drawn = weigh(query, n)
        return Posterior.of(drawn.guide, drawn.plates, drawn.u - math.log(n), query, drawn.model)

    def run(self, *args, **kwargs):
        query = Query(self.model, self.guide, args, kwargs)
        seen = self.weighted(query, self.pilot)
        n = math.ceil(self.ess * self.pilot / float(seen.ess.min().clamp(min=1)))
        return self.weighted(query, min(n, self.most))


for name, guide in {"the prior": None, "a trained guide": guides["halves, Le Cam"].guide}.items():
    found = Enough(model, guide).run(y)
    print(f"{name}: {found.num_particles} particles, smallest ESS {found.ess.min():.0f}")

# %% [markdown]
# ## All of them beside the truth
#
# `compare` takes any object with `run`. The exact posterior is known here, because all 1110 strings of up to three
# digits can be enumerated.

# %%
best = guides["halves, Le Cam"]
enough = {"enough, from the prior": Enough(model), "enough, from a guide": Enough(model, best.guide)}
table = compare(model, enough | guides, y, exact=exact)
table

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 2.9), sharey=True)
shown = {"exact": exact, "enough, from a guide": Enough(model, best.guide).run(y)}
for ax, d in zip(axes, (0, 1, 2), strict=True):
    names = [s for s, _ in exact.table("z", d)[:7]]
    for i, (name, posterior) in enumerate(shown.items()):
        p = dict(posterior.table("z", d))
        ax.bar(torch.arange(len(names)) + 0.4 * (i - 0.5), [p.get(s, 0) for s in names], 0.4, label=name)
    ax.set_xticks(range(len(names)), [s.strip(".") for s in names])
    ax.set(title=f"{typed[d]!r} was typed", xlabel="what was meant")
axes[0].set_ylabel("posterior probability")
axes[2].legend(frameon=False, fontsize=8)
fig.tight_layout()
plt.show()

# %% [markdown]
# The claims of this page, as assertions. The evidence of an importance sampler is unbiased, so that its mean over
# runs is within five standard errors of the truth.

# %%
assert (LeCam().slope(delta) - from_f).abs().max() < 1e-9
ratios = torch.stack(
    [(Enough(model, best.guide, ess=100).run(y).log_evidence - exact.log_evidence).exp() for _ in range(20)]
)
errors = (ratios.mean(0) - 1).abs() / (ratios.std(0) / math.sqrt(len(ratios)))
print(f"largest error of the evidence: {errors.max():.1f} standard errors")
assert errors.max() < 5
assert all(table[name].density_tv < 0.3 for name in guides)

# %% [markdown]
# ## What to read next
#
# - [Extending](../extending.md): also constraints, tools and experiments, and where a piece goes in the package.
# - [Objectives](../objectives.md): every balance and divergence in one notation.
# - [Training](../training.md): what `fit` can be told.
# - [Can this be trusted?](../diagnose.md) `diagnose` takes an algorithm of your own too.
