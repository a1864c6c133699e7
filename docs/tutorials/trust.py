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
# `diagnose` asks all of them in one call. We let it judge four algorithms, of which two are wrong on purpose. The
# model is so small that the truth can be enumerated, so that we can judge the judge, too.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
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
# What did Tom take? The latent text is a word and a full stop, the observed one is the next sentence.

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
answer = prior.run(x, y)
print(
    f"log evidence {answer.log_evidence.item():.2f}, ESS {answer.ess.item():.1f} of 256, k-hat {answer.khat.item():.2f}"
)

# %% [markdown]
# Few of the 256 words can be sliced, and they have all the weight: the effective sample size (ESS) is small. Pareto
# k-hat describes the tail of the weights; above 0.7 their average cannot be relied on. Both say: do not trust this.
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
gflownet.fit(batches, steps=200, progress=False)

pyro.set_rng_seed(0)
trained = Importance(model, guide, num_particles=256)
print(f"ESS {trained.run(x, y).ess.item():.1f} of 256")

# %% [markdown]
# Healthy weights are necessary, but they are not enough. The next guide is the same, but for one thing: it never
# says "lemon", which happens to be the most probable answer.

# %%
forgetful = Importance(model, guide_with(allowed=ban(lm, [" lemon"])), num_particles=256)
answer = forgetful.run(x, y)
print(
    f"log evidence {answer.log_evidence.item():.2f}, ESS {answer.ess.item():.1f} of 256, k-hat {answer.khat.item():.2f}"
)

# %% [markdown]
# The weights look fine. **What a guide never proposes, its weights never miss.** The answer is wrong by more than
# half:

# %%
truth = Enumeration(model).run(x, y)
answers = {"truth": truth, "prior": prior.run(x, y), "trained": trained.run(x, y), "forgetful": answer}
words = [word for word, _ in truth.table("z", 0)[:4]]
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for i, (name, posterior) in enumerate(answers.items()):
    p = dict(posterior.table("z", 0))
    places = [w + 0.2 * i for w in range(len(words))]
    axis.bar(places, [p.get(word, 0.0) for word in words], 0.18, label=name)
axis.set_xticks([w + 0.3 for w in range(len(words))], words)
axis.set(ylabel="posterior probability", xlabel="z")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()
# %% [markdown]
# ## 2. Is the evidence right?
#
# An estimate of the evidence by importance sampling or SMC is too low on average, on the log scale. If one of its
# particles is a true draw of the posterior, it is too high on average. So log Z lies between the two. Where does a
# true draw come from? Simulate: draw z and y from the model. Then z is a draw of p(z | y).
#
# `Sandwich` computes both bounds. Here the exact posterior is known, so take the true draws from it, for our own
# question. The gap closes with more particles, fast for a good proposal and slowly for a bad one.

# %%
sizes = [4, 16, 64, 256]
pyro.set_rng_seed(0)
figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained", sharey=True)
bounds = {}
for axis, (name, algorithm) in zip(
    axes, {"prior": prior, "trained": trained, "forgetful": forgetful}.items(), strict=True
):
    found = [
        Sandwich(model, algorithm.guide, n, ess_threshold=0, repetitions=32).run(x, y, exact_sample=truth)
        for n in sizes
    ]
    bounds[name] = found[-1]
    axis.plot(sizes, [b.lower.item() for b in found], "^-", label="lower bound")
    axis.plot(sizes, [b.upper.item() for b in found], "v-", label="upper bound")
    axis.axhline(truth.log_evidence.item(), color="black", linewidth=1, label="truth")
    axis.set(xscale="log", xlabel="particles", title=name)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("log evidence (nats)")
axes[0].legend(frameon=False)
for name, b in bounds.items():
    print(f"{name:9s} {b.lower.item():7.3f} <= log Z <= {b.upper.item():7.3f}")

# %% [markdown]
# For the forgetful guide the upper bound is infinite: some true draws are lemons, which it cannot propose. The
# lower bound alone would not have told.
#
# ## 3. Are the draws from the posterior?
#
# Simulation-based calibration (SBC) also starts from simulated pairs (z, y). Ask the algorithm for draws of p(z |
# y). The simulated z is one more draw of the same posterior, so it must look like the others: its rank among them,
# by any statistic, is uniform. `diagnose` does this with 100 data sets and many statistics, tests them together,
# and adds the weights and the sandwich. It needs to know where the simulated observation goes, because a guide
# reads it there.


# %%
def simulate(args, observed):
    return args[0], observed["y"]


verdicts = {"trained": diagnose(trained, x, y, simulate=simulate)}
verdicts["trained"].print()

# %%
verdicts["trained"].plot("trained.png")
Image("trained.png")

# %% [markdown]
# Nothing is suspect. Left: of each statistic, how far the ranks of the simulated z are from uniform; lines inside
# the grey band are as they should be. Then the bounds of the evidence for each simulated data set, the weights, and
# the lengths.
#
# Now the forgetful guide:

# %%
verdicts["forgetful"] = diagnose(forgetful, x, y, simulate=simulate)
verdicts["forgetful"].print()

# %% [markdown]
# *guide misses* is the share of the evidence that the model's own draws find and the guide's do not.
#
# The last algorithm has a bug of another kind: somebody forgot the weights. Its draws are those of the prior,
# equally weighted. ESS and k-hat see nothing, because equal weights are the healthiest there are.


# %%
class Unweighted(Importance):
    """Importance sampling without the weights."""

    def run(self, *args, **kwargs):
        found = super().run(*args, **kwargs)
        even = torch.zeros_like(found.log_weights).log_softmax(0) + found.log_evidence
        return replace(found, log_weights=even)


verdicts["unweighted"] = diagnose(Unweighted(model, num_particles=256), x, y)
verdicts["unweighted"].print()

# %%
verdicts["unweighted"].plot("unweighted.png")
Image("unweighted.png")

# %% [markdown]
# SBC finds it, by one statistic: log p(observed), how well a draw explains the observation. Draws of the prior
# explain it worse than the simulated z does. Ranks of z alone would not have found it: averaged over data, draws of
# the prior *are* like the simulated z.
#
# ## How do we know?
#
# The truth is known here. The trained guide, which passed, is near it, and what did not pass is not.

# %%
verdicts["prior"] = diagnose(prior, x, y)
right = dict(truth.table("z", 0))
for name, diagnosis in verdicts.items():
    found = dict(diagnosis.posterior.table("z", 0))
    distance = sum(abs(right.get(z, 0.0) - found.get(z, 0.0)) for z in right.keys() | found.keys()) / 2
    suspects = ", ".join(finding.name for finding in diagnosis.findings if finding.suspect)
    print(f"{name:10s} total variation {distance:.2f}; suspect: {suspects or 'nothing'}")
    assert diagnosis.ok == (distance < 0.15)

errors = {name: b.standard_errors for name, b in bounds.items()}
for name in ("prior", "trained"):
    b, (low, high) = bounds[name], errors[name]
    assert b.lower - 5 * low < truth.log_evidence < b.upper + 5 * high
assert bounds["forgetful"].upper.item() == float("inf")

# %% [markdown]
# ## What to read next
#
# - [Can this answer be trusted?](../diagnose.md): every row of the table, and how often each fault is found.
# - [Your first text model](first_model.ipynb): the model and the guide of this page, step by step.
# - [Constraints](constraints.ipynb): another way to be confidently wrong.
# - [Algorithms, side by side](../algorithms.md): all algorithms against the truth, at equal cost.
# - [Training](../training.md): the same verdict while a guide is trained.
