# %% [markdown]
# # Can this be trusted?
#
# In most models of texts nobody knows the true posterior. An algorithm returns an answer all the same. This
# tutorial asks three questions of an answer, none of which needs the truth:
#
# 1. Are the weights healthy? (effective sample size, Pareto k-hat)
# 2. Is the evidence right? (a sandwich: a bound from below, a bound from above)
# 3. Are the draws from the posterior? (simulation-based calibration)
#
# `diagnose` asks all of them in one call. We let it judge four algorithms, three of which are wrong. The model is
# so small that the truth can be enumerated, so that we can judge the judge, too.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas
import pyro
import torch
from IPython.display import Image
from peft import LoraConfig

import lmppl
from lmppl import LanguageModel
from lmppl.constraints import ban
from lmppl.distributions import Completion
from lmppl.inference import Enumeration, GFlowNet, Importance, Sandwich, diagnose

# %% [markdown]
# ## A question
#
# > Tom went to the kitchen. He took the small [...]. He sliced it.
#
# What did Tom take? The latent text is a word and a full stop. The observed text is the next sentence.

# %%
lm = LanguageModel.embedded("stories")


def model(x, y):
    with pyro.plate("stories", len(x)):
        z = pyro.sample("z", Completion(lm, x, max_tokens=2, stop="."))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=y.shape[-1], stop=None), obs=y)


x = lm.encode(["Tom went to the kitchen. He took the small"])
y = lm.encode([" He sliced it."])

# %% [markdown]
# ## 1. Are the weights healthy?
#
# The first algorithm is importance sampling from the prior.

# %%
pyro.set_rng_seed(0)
prior = Importance(model, num_particles=256)
answers = {"prior": prior.run(x, y)}
answers["prior"]

# %% [markdown]
# Few of the 256 words can be sliced, and they have nearly all the weight: the effective sample size (ESS) is small.
# Pareto k-hat describes the tail of the weights; above 0.7 their average cannot be relied on. Both say: do not
# trust this.
#
# A guide that reads the ending first does better. It is the same language model with a LoRA adapter, trained on
# other stories for a few seconds ([Your first text model](first_model.ipynb) explains it).

# %%
q = lm.with_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def guide_with(**options):
    def guide(x, y):
        with pyro.plate("stories", len(x)):
            prompt = q.fill("Ending:{y}\nStory:{x}", x=x, y=y)
            pyro.sample("z", Completion(q, prompt, max_tokens=2, stop=".", **options))

    return guide


def arguments(stories):
    """The beginning of each story up to its object, and its ending."""
    return lm.encode([s.x + s.z.rsplit(" ", 1)[0] for s in stories]), lm.encode([s.y for s in stories])


stories = lmppl.embedded.data("stories", "train")
batches = [arguments(stories[i : i + 8]) for i in range(0, len(stories), 8)]
guide = guide_with()
gflownet = GFlowNet(model, guide, optimizer=torch.optim.AdamW(q.trainable_parameters(), lr=3e-3))
gflownet.fit(batches, steps=100, progress=False)

pyro.set_rng_seed(0)
trained = Importance(model, guide, num_particles=256)
answers["trained"] = trained.run(x, y)
answers["trained"]

# %% [markdown]
# Healthy weights are necessary. They are not enough. The next guide is the trained one with one fault: somebody
# left a constraint in it, and it cannot say a word of more than four letters.

# %%
words = {" " + story.z.rsplit(" ", 1)[1].rstrip(".") for story in stories}
long = sorted(word for word in words if len(word.strip()) > 4)
print(f"{len(long)} of {len(words)} objects are too long")

limited = Importance(model, guide_with(allowed=ban(lm, long)), num_particles=256)
pyro.set_rng_seed(0)
answers["limited"] = limited.run(x, y)
answers["limited"]

# %% [markdown]
# The effective sample size is large. **What a guide never proposes, its weights never miss.** Yet the answer is
# wrong: the most probable word has five letters.

# %%
truth = Enumeration(model).run(x, y)
table = pandas.DataFrame({name: dict(p.table("z", 0)) for name, p in {"truth": truth, **answers}.items()}).fillna(0)
axis = table.nlargest(5, "truth").plot.bar(figsize=(7, 3), rot=0, xlabel="z", ylabel="posterior probability")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 2. Is the evidence right?
#
# The log of an evidence estimate, by importance sampling or SMC, is too low on average. If one of its particles is
# replaced by a true draw of the posterior, it is too high on average. So log Z, the log evidence, lies between the
# two.
#
# Where does a true draw come from? From a simulation: draw z and y from the model; then z is a draw of p(z | y).
# Here we also have the exact posterior, so `Sandwich` can take true draws for our own question from it. The bounds
# meet as particles are added, soon for a good proposal and late for a bad one.

# %%
sizes, REPETITIONS = [4, 32, 256], 16
pyro.set_rng_seed(0)
figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained", sharey=True)
bounds = {}
for axis, (name, proposal) in zip(
    axes, {"prior": None, "trained": guide, "limited": limited.guide}.items(), strict=True
):
    sandwiches = [Sandwich(model, proposal, n, ess_threshold=0, repetitions=REPETITIONS) for n in sizes]
    found = [sandwich.run(x, y, exact_sample=truth) for sandwich in sandwiches]
    axis.plot(sizes, [b.upper.item() for b in found], "v-", label="upper bound")
    axis.plot(sizes, [b.lower.item() for b in found], "^-", label="lower bound")
    axis.axhline(truth.log_evidence.item(), color="black", linewidth=1, label="truth")
    axis.set(xscale="log", xlabel="particles", title=name)
    axis.spines[["top", "right"]].set_visible(False)
    bounds[name] = found[-1]
axes[0].set_ylabel("log evidence (nats)")
axes[0].legend(frameon=False)
plt.show()

for name, b in bounds.items():
    print(f"{name}: {b.lower.item():.3f} <= log Z <= {b.upper.item():.3f} with {sizes[-1]} particles")

# %% [markdown]
# For the limited guide the upper bound is infinite, and cannot be drawn: some true draws are words that this guide
# cannot say. The lower bound alone would not have told.
#
# ## 3. Are the draws from the posterior?
#
# Simulation-based calibration (SBC) starts from simulated pairs (z, y), too. Ask the algorithm for draws of p(z |
# y). The simulated z is one more draw of the same posterior, so nothing may distinguish it from the others: its
# rank among them, by any statistic, is uniform. `diagnose` does this with 100 data sets and several statistics,
# tests all of them together, and adds the weights and the sandwich. A guide reads the observation from its
# arguments, so say where the simulated one goes.


# %%
def simulate(args, observed):
    return args[0], observed["y"]


verdicts = {"trained": diagnose(trained, x, y, simulate=simulate)}
verdicts["trained"]

# %%
verdicts["trained"].plot("trained.png")
Image("trained.png")

# %% [markdown]
# Nothing is suspect. The picture has a panel for each kind of check. Calibration: how far the ranks are from
# uniform; lines within the grey band are as they should be. Evidence: the bounds for each simulated data set.
# Weights: the largest first. Lengths: of the guide's texts and of the posterior's.
#
# Now the limited guide:

# %%
verdicts["limited"] = diagnose(limited, x, y, simulate=simulate)
verdicts["limited"]

# %% [markdown]
# The simulated data contain what the guide cannot say. How often they do so matters: one rare word that is missing is
# found only if it comes up in one of the 100 data sets, or often enough among the model's own draws ("guide misses"
# and "guide lacks").
#
# The last algorithm has a bug of another kind: somebody forgot the weights. Its draws are draws of the prior, with
# equal weights. By ESS nothing is better than equal weights.


# %%
class Unweighted(Importance):
    """Importance sampling without the weights."""

    def run(self, *args, **kwargs):
        found = super().run(*args, **kwargs)
        even = torch.zeros_like(found.log_weights).log_softmax(0) + found.log_evidence
        return replace(found, log_weights=even)


verdicts["unweighted"] = diagnose(Unweighted(model, num_particles=256), x, y)
verdicts["unweighted"]

# %%
verdicts["unweighted"].plot("unweighted.png")
Image("unweighted.png")

# %% [markdown]
# It is found by the statistics that look at the observation. Draws of the prior explain it worse than the simulated
# z does: log p(observed) is too low. The statistics of z alone find nothing, because averaged over data sets the
# simulated z are draws of the prior.
#
# ## How do we know?
#
# The truth is known here, so we can judge the judge: the answer that passes is near the truth, and those that do
# not pass are not.

# %%
verdicts["prior"] = diagnose(prior, x, y)
right = dict(truth.table("z", 0))
for name, diagnosis in verdicts.items():
    found = dict(diagnosis.posterior.table("z", 0))
    distance = sum(abs(right.get(z, 0.0) - found.get(z, 0.0)) for z in right | found) / 2
    suspects = ", ".join(finding.name for finding in diagnosis.findings if finding.suspect)
    print(f"{name}: total variation {distance:.2f} from the truth; suspect: {suspects or 'nothing'}")
    assert diagnosis.ok == (distance < 0.15) == (name == "trained")

assert answers["limited"].ess > 10 * answers["prior"].ess  # the weights alone do not tell
assert verdicts["unweighted"]["SBC: log p(observed)"].suspect
for name in ("prior", "trained"):
    low, high = bounds[name].standard_errors
    assert bounds[name].lower - 5 * low < truth.log_evidence < bounds[name].upper + 5 * high
assert bounds["limited"].upper.item() == float("inf")

# %% [markdown]
# ## What to read next
#
# - [Can this answer be trusted?](../diagnose.md): every row of the table, and how often each fault is found.
# - [Your first text model](first_model.ipynb): the model and the guide of this page, step by step.
# - [Constraints](constraints.ipynb): what a constraint in a proposal does, and what the weights repair.
# - [Algorithms, side by side](../algorithms.md): all algorithms against the truth, at equal cost.
# - [Training](../training.md): the same verdict while a guide is trained.
