# %% [markdown]
# # Topics: text beside ordinary random variables
#
# A text site is a Pyro site like any other. So a program can mix it with a `Dirichlet`, a `Categorical` and plates.
# This tutorial builds a topic model in which a *topic is a prompt*.
#
# **What we want to know.** A teacher sets three sums. Every pupil picks one of them, works it out and hands in a
# sheet. On each sheet only the answer can be read. Which sum was it, what was the working, and how popular is each
# sum?
#
# | | | in the program |
# |---|---|---|
# | popularity of the sums | $\theta \sim \mathrm{Dirichlet}(1, 1, 1)$ | shared by all sheets |
# | which sum (the topic) | $k_d \sim \mathrm{Categorical}(\theta)$ | one a sheet |
# | the working | $z_d \sim \mathrm{LM}(\text{sum}_{k_d})$ | a latent text |
# | the answer | $y_d \sim \mathrm{LM}(\text{sum}_{k_d}\, z_d)$ | a text, observed |
#
# The pupils are the small language model "arithmetic", which ships with the package and often misreads a sign or a
# number.

# %%
import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from peft import LoraConfig
from pyro.infer import SVI
from torch.distributions import constraints

from lmppl import LanguageModel
from lmppl.distributions import Completion, NextToken
from lmppl.inference import Enumeration, Importance, SupervisedFineTuning, VarGrad, dreams

torch.set_num_threads(1)
pyro.set_rng_seed(3)
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

lm = LanguageModel.embedded("arithmetic")
sums = ["7 + 2", "9 - 4", "6 + 7"]
topics = lm.encode([f"Question: {s} = ? Answer:" for s in sums])  # (3, tokens): three prompts

# %% [markdown]
# ## The model
#
# `topics[k]` picks a prompt for every sheet. Inference runs all particles at once, so `k` has the shape (particles,
# sheets); indexing, `lm.join` and `Completion` work on any number of leading axes.

# %%
ANSWER = " The answer is"


def working(language_model, prompt):
    return Completion(language_model, prompt, max_tokens=5, stop=".")


def answer(x, z):
    return Completion(lm, lm.join(x, z, ANSWER), max_tokens=1, stop=None)


def model(y):
    theta = pyro.sample("theta", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("sheets", len(y)):
        k = pyro.sample("k", dist.Categorical(theta))
        z = pyro.sample("z", working(lm, topics[k]))
        pyro.sample("y", answer(topics[k], z), obs=y)


# %% [markdown]
# The data are drawn from the same program, with a popularity that we pretend not to know. A sheet that says 5 is the
# sum 9 - 4, or it is 7 + 2 read as 7 - 2.

# %%
true_theta, sheets = torch.tensor([0.6, 0.3, 0.1]), 16
true_k = dist.Categorical(true_theta).sample((sheets,))
true_z = working(lm, topics[true_k]).sample()
y = answer(topics[true_k], true_z).sample()  # (16, 1): one token each
print("what can be read:", *lm.decode(y))
for d in range(4):
    print(f"sheet {d}: {sums[true_k[d]]}: {lm.decode(true_z[d])}{ANSWER}{lm.decode(y[d])}")

# %% [markdown]
# ## The obvious way fails
#
# Importance sampling guesses everything from the prior. $\theta$ is shared by all sheets, so all sheets share one
# weight, and a guess has to suit all of them at once. The effective sample size (ESS) shows it:

# %%
guessed = Importance(model, num_particles=1000).run(y)
print(f"ESS {guessed.ess:.1f} of {guessed.num_particles}, log evidence {guessed.log_evidence:.1f}")

# %% [markdown]
# A good guide has two parts: a trained language model for the texts, and `pyro.infer.SVI` for the ordinary variables.
#
# ## The texts: an adapter that reads the answer first
#
# Take one sheet and suppose its sum is known. What is missing is the working, given sum and answer. That is a smaller
# program, `given_topic`, whose plate encloses everything: its rows do not share weights. A LoRA adapter of the same
# language model becomes its guide. It is trained on *dreams*: run the model forward, then learn to guess the working
# from the answer.

# %%
q = lm.with_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def explained(x, y):  # what the guide writes: the working of a sum x, once it has read the answer
    return working(q, q.fill(" The answer is{y}.{x}", x=x, y=y))


def given_topic(x, y):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", working(lm, x))
        pyro.sample("y", answer(x, z), obs=y)


def text_guide(x, y):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", explained(x, y))


optimizer = torch.optim.AdamW(q.trainable_parameters(), lr=3e-3)
trainer = SupervisedFineTuning(given_topic, text_guide, optimizer=optimizer, examples=dreams(given_topic))
any_y = y[:1].expand(96, -1)  # its values are replaced by dreamt ones
history = trainer.fit([(topics.repeat(32, 1), any_y)], steps=200, progress=False)
print(f"loss {history[0]['loss']:.2f} -> {history[-1]['loss']:.2f} nats a text")

# %% [markdown]
# The guide gives the evidence of every pair of a sheet and a sum, with the working integrated out:
# $\ell_{dk} = \log p(y_d \mid k)$.

# %%
rows_x, rows_y = topics.repeat(sheets, 1), y.repeat_interleave(3, 0)  # 16 x 3 pairs
texts = Importance(given_topic, text_guide, num_particles=300).run(rows_x, rows_y)
log_likelihood = texts.log_evidence.view(sheets, 3)
print(f"ESS of the 48 pairs, of 300: median {texts.ess.median():.0f}, smallest {texts.ess.min():.0f}")

# %% [markdown]
# ## The ordinary part: SVI
#
# Now the guide of the whole model. Given $\theta$, the posterior of a topic is known up to its normalisation,
# $q(k_d \mid \theta) \propto \theta_k e^{\ell_{dk}}$, and the adapter writes the working. Three numbers are left to
# learn, the concentration of $\theta$.
#
# lmppl's objectives are Pyro losses. `VarGrad` compares $u = \log p - \log q$ between particles. It is zero exactly
# at the posterior, where u is the same for all. It needs no reparameterisation: a text has none. With
# `divergence="forward_kl"` the guide is pulled to wherever the posterior is, as a proposal should be, and a single
# odd text cannot rule a step.

# %%


def guide(y):
    concentration = pyro.param("concentration", torch.full((3,), 2.0), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Dirichlet(concentration))
    with pyro.plate("sheets", len(y)):
        k = pyro.sample("k", dist.Categorical(logits=theta.log() + log_likelihood))
        pyro.sample("z", explained(topics[k], y))


pyro.clear_param_store()
optimizer = pyro.optim.ClippedAdam({"lr": 0.2, "lrd": 0.97})
svi = SVI(model, guide, optimizer, loss=VarGrad(num_particles=24, divergence="forward_kl"))
path = []
for _ in range(80):
    svi.step(y)
    path.append(pyro.param("concentration").detach().clone())
concentration = path[-1]

# %%
fig, ax = plt.subplots(figsize=(5, 2.4))
for k, color in enumerate(("#4477aa", "#ee6677", "#ccbb44")):
    ax.plot([c[k] for c in path], color=color, label=sums[k])
ax.set(xlabel="step of SVI", ylabel="concentration of θ", ylim=(0, None))
ax.legend(frameon=False, ncols=3, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
plt.show()

# %% [markdown]
# ## The answer
#
# The guide is good, but not exact. `Importance` draws from it and gives each draw the weight $e^u$.

# %%
posterior = Importance(model, guide, num_particles=1000).run(y)
print(f"ESS {posterior.ess:.0f} of {posterior.num_particles}, log evidence {posterior.log_evidence:.3f}")
weights = posterior.probabilities.double()
sampled_k = torch.stack([(weights[:, None] * (posterior.samples["k"] == k)).sum(0) for k in range(3)], 1)  # (16, 3)
for d in sampled_k.amax(1).argsort()[:2].tolist():  # where the topic is least certain
    print(f"\nsheet {d} says {lm.decode(y[d])}; it was {sums[true_k[d]]}, worked out as {lm.decode(true_z[d])}")
    for (k, z), p in posterior.table(["k", "z"], index=d)[:3]:
        print(f"   {p:.3f}   {sums[k]}: {z}")

# %% [markdown]
# ## How do we know that it is right?
#
# Everything here can be counted. The workings of a sum are few: `Enumeration` lists them with their probabilities
# until less than one in ten thousand is left out. One forward pass gives the answers that follow.


# %%
def workings(x):
    with pyro.plate("sums", len(x)):
        pyro.sample("z", working(lm, x))


listed = Enumeration(workings, mass=0.9999).run(topics)
z, p_z = listed.samples["z"], listed.log_weights.exp().double()  # (Z, 3, tokens), (Z, 3)
with torch.no_grad():
    p_answer = NextToken(lm, lm.join(topics, z, ANSWER)).log_prob(y[:, 0, None, None]).exp().double()  # (16, Z, 3)
exact_likelihood = (p_z * p_answer).sum(1)  # (16, 3): p(y_d | k)
left_out = 1 - p_z.sum(0)
print(f"{len(z)} workings; probability left out {left_out.max():.5f}")

# %% [markdown]
# Given the topics, $\theta$ is Dirichlet again. Only the *counts* of the topics matter, so adding one sheet after
# another sums over all $3^{16}$ assignments in a small table. The exact posterior of $\theta$ is a mixture of
# Dirichlets, one for each triple of counts.


# %%
def count(likelihood):
    """All triples of counts (T, 3), and log p(y, counts), (T,)."""
    table = {(0, 0, 0): 1.0}
    for row in likelihood.tolist():
        longer: dict[tuple[int, ...], float] = {}
        for counts, p in table.items():
            for k in range(3):
                new = tuple(c + (j == k) for j, c in enumerate(counts))
                longer[new] = longer.get(new, 0.0) + p * row[k]
        table = longer
    counts = torch.tensor(list(table), dtype=torch.double)
    log_prior = (counts + 1).lgamma().sum(1) + math.lgamma(3) - math.lgamma(3 + len(likelihood))
    return counts, torch.tensor(list(table.values()), dtype=torch.double).log() + log_prior


def topics_exactly(likelihood):
    """p(k_d | y), (16, 3): the counts without sheet d, then sheet d on each topic."""
    found = []
    for d, row in enumerate(likelihood):
        counts, log_p = count(torch.cat([likelihood[:d], likelihood[d + 1 :]]))
        p = log_p.softmax(0)[:, None] * (counts + 1) / (len(likelihood) + 2)  # p(k_d | the other sheets)
        found.append(p.sum(0) * row)
    return torch.stack([f / f.sum() for f in found])


counts, log_p = count(exact_likelihood)
above = count(exact_likelihood + left_out)[1].logsumexp(0)  # as if what was left out explained every sheet
exact_k = topics_exactly(exact_likelihood)
error = 1 / posterior.ess.sqrt()
print(
    f"log evidence: exactly between {log_p.logsumexp(0):.3f} and {above:.3f}, by sampling {posterior.log_evidence:.3f}"
)
print(f"topics: largest difference {(sampled_k - exact_k).abs().max():.3f}, one standard error at most {error / 2:.3f}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1.6, 1))
bottom = torch.zeros(sheets, dtype=torch.double)
for k, color in enumerate(("#4477aa", "#ee6677", "#ccbb44")):
    axes[0].bar(range(sheets), sampled_k[:, k], bottom=bottom, color=color, label=sums[k], width=0.85)
    bottom = bottom + sampled_k[:, k]
    at = (true_k == k).nonzero()[:, 0]
    axes[0].scatter(at, torch.full((len(at),), 1.05), color=color, marker="v", s=28)
axes[0].scatter(range(sheets), exact_k.cumsum(1)[:, 0], color="black", marker="_", s=60, label="exact")
axes[0].scatter(range(sheets), exact_k.cumsum(1)[:, 1], color="black", marker="_", s=60)
axes[0].set(xlabel="sheet, with the answer that it shows", ylabel="p(topic | all answers)", ylim=(0, 1.12))
axes[0].set_xticks(range(sheets), [s.strip() for s in lm.decode(y)], fontsize=8)
axes[0].legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.17), frameon=False)

grid = torch.linspace(0.005, 0.995, 199)
for k, color in enumerate(("#4477aa", "#ee6677", "#ccbb44")):
    a = counts[:, k] + 1
    mixture = dist.Beta(a, sheets + 3 - a).log_prob(grid[:, None]).exp() @ log_p.softmax(0)
    variational = dist.Beta(concentration[k], concentration.sum() - concentration[k]).log_prob(grid).exp()
    axes[1].plot(grid, mixture, color=color, label=sums[k])
    axes[1].plot(grid, variational, color=color, linestyle=":")
    axes[1].axvline(true_theta[k], color=color, linewidth=0.8, linestyle="--")
axes[1].set(xlabel="popularity of a sum", ylabel="density")
axes[1].legend(
    title="line: exact\ndots: SVI\ndashes: true", fontsize=8, title_fontsize=8, frameon=False, loc=(0.8, 0.55)
)
fig.tight_layout()
plt.show()

# %% [markdown]
# A triangle above a bar shows the sum that the pupil had in fact. Where an answer fits several sums, the popular one
# is more probable: all sheets together decide about each.

# %%
exact_theta = (log_p.softmax(0)[:, None] * (counts + 1) / (sheets + 3)).sum(0)
sampled_theta = (weights[:, None] * posterior.samples["theta"].double()).sum(0)
for k in range(3):
    print(f"E[theta] of {sums[k]}: exactly {exact_theta[k]:.3f}, by sampling {sampled_theta[k]:.3f}")

# %% [markdown]
# The claims of this page, as assertions: the joint guide works where guessing does not, and evidence, topics and
# popularities are within five standard errors of the truth.

# %%
slack = above - log_p.logsumexp(0)
assert guessed.ess < 20 and posterior.ess > 50 * guessed.ess
assert log_p.logsumexp(0) - 5 * error < posterior.log_evidence < above + 5 * error
assert (sampled_k - exact_k).abs().max() < 5 * error / 2 + slack
assert (sampled_theta - exact_theta).abs().max() < 5 * error / 2 + slack

# %% [markdown]
# ## What to read next
#
# - [Algorithms](../algorithms.md): all samplers and trainers on one task at equal tokens.
# - [Objectives](../objectives.md): what `VarGrad` is, and its relatives.
# - [Extending](../extending.md): a distribution, an objective or an algorithm of your own.
# - [Can this be trusted?](../diagnose.md) What to ask where nothing can be counted.
