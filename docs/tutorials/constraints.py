# %% [markdown]
# # Constraints: a mask on each token, a condition on the text
#
# We want the language model to write a text of a given form: a number, JSON, a story that ends in a certain way.
# There are two things that one may mean by this, and they give different texts:
#
# - a *mask*: at every token, forbid what cannot lead to an allowed text, and renormalise. This is what constrained
#   decoding does.
# - a *condition*: write as if nothing were asked for, and keep a text only if it is of the form. This is Bayes'
#   rule.
#
# In this tutorial you see how far they are apart, and how the mask, as a proposal, still gives the condition's
# answer.

# %%
import matplotlib.pyplot as plt
import pyro
import torch

from lmppl import LanguageModel
from lmppl.constraints import ban, every, regex
from lmppl.distributions import Completion
from lmppl.inference import SMC, Enumeration, Importance

# %% [markdown]
# ## By hand
#
# A language model of two tokens writes "a" or "b" first. After "a", the next token is almost never one that we
# allow; after "b" it mostly is.

# %%
first = {"a": 0.9, "b": 0.1}  # p(first token)
allowed = {"a": 0.01, "b": 0.90}  # p(second token is allowed | first token)

joint = {token: first[token] * allowed[token] for token in first}
condition = {token: joint[token] / sum(joint.values()) for token in first}
for token in first:
    print(f"{token}: by mask {first[token]:.2f}, by condition {condition[token]:.2f}")

# %% [markdown]
# Both first tokens can lead to an allowed text, so the mask forbids neither, and keeps their probabilities: it
# gives the mass of each forbidden token to its allowed *siblings*. The condition gives the mass of forbidden texts
# to *all* allowed texts. The mask chooses "a" before it knows what this costs later.
#
# ## With a language model
#
# Now a story whose end is fixed and whose object is open:
#
# > Tom went to the kitchen. He took the small [object]. He sliced it.
#
# `regex` is a constraint on the next token: it allows a token if some text that matches goes on with it. (This
# vocabulary has a token for a lone space, after which it spells no word: it is banned.)

# %%
lm = LanguageModel.embedded("stories")
beginning = "Tom went to the kitchen. He took the small"
form = every(regex(lm, r" [a-z]+\. He sliced it\.", stop=None), ban(lm, [" "]))


def story(constraint=None):
    """Six tokens: an object, a full stop, and a sentence."""
    return Completion(lm, beginning, max_tokens=6, stop=None, allowed=constraint)


pyro.set_rng_seed(0)
print("free:  ", *lm.decode(story().sample((4,))), sep="\n")
print("masked:", *lm.decode(story(form).sample((4,))), sep="\n")

# %% [markdown]
# The masked stories end as they should, and make no sense. In Pyro terms the two programs are these. A mask belongs
# to the distribution; a condition is a factor on what was drawn.


# %%
def masked():
    pyro.sample("z", story(form))


def conditioned():
    z = pyro.sample("z", story())
    pyro.factor("form", form.log_indicator(z))


# %% [markdown]
# ## The truth
#
# Both distributions have the same texts, those of the form. They are few enough to list them with their exact
# probabilities: `Enumeration` gives the mask's, and the condition's are those of the free language model, divided
# by their sum. That sum is the evidence: how often the free model writes a text of the form.

# %%
mask = Enumeration(masked).run()
texts = mask.samples["z"]
with torch.no_grad():
    log_p = story().log_prob(texts).double()
log_evidence = log_p.logsumexp(0)
p, q = (log_p - log_evidence).exp(), mask.log_weights.double().exp()
distance = (p - q).abs().sum() / 2
print(f"{len(texts)} texts; the free model writes one of them with probability {log_evidence.exp():.4f}")
print(f"total variation between condition and mask: {distance:.2f}")

# %%
names = [s.split(".")[0].strip() for s in lm.decode(texts)]
shown = list(dict.fromkeys([*p.argsort(descending=True)[:4].tolist(), *q.argsort(descending=True)[:6].tolist()]))
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
rows = torch.arange(len(shown))
axis.barh(rows - 0.2, p[shown], 0.38, label="condition")
axis.barh(rows + 0.2, q[shown], 0.38, label="mask")
axis.set_yticks(rows, [names[i] for i in shown])
axis.invert_yaxis()
axis.set(xlabel="probability", ylabel="object")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What the mask leaves out
#
# The weight of a masked text is the probability that the mask kept, token by token:
#
# $$\frac{p(z)}{q(z)} = \prod_t \sum_v p(v \mid z_{<t}) \, c(v \mid z_{<t}),$$
#
# where $c = 1$ for allowed tokens. Follow it through some of the stories: all start level, and the weight falls
# where the free model did not want to write what the mask enforced.

# %%
with torch.no_grad():
    kept = (story().token_log_probs(texts) - story(form).token_log_probs(texts)).double()
weights = kept.cumsum(-1) / torch.log(torch.tensor(10.0))
figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
for i in shown:
    axis.plot(range(7), [0.0, *weights[i]], marker="o", markersize=3, label=names[i])
axis.set_xticks(range(7), ["", "object", ".", " He", " sliced", " it", "."])
axis.set(xlabel="token", ylabel="weight so far (log10)")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False, fontsize=8, ncols=2)
plt.show()

# %% [markdown]
# All of it falls at the verb. There the mask enforced what the free model finds all but impossible after most
# objects, and the object had been chosen long before.
#
# ## The mask as a proposal
#
# So draw with the mask and weigh each draw by what the mask left out: that is importance sampling of the
# conditioned program with the masked one as its guide. `SMC` applies the same weights token by token and resamples
# on the way.

# %%
N, RUNS = 500, 10
algorithms = {
    "prior": Importance(conditioned, num_particles=N),
    "mask": Importance(conditioned, masked, num_particles=N),
    "SMC with mask": SMC(conditioned, masked, num_particles=N),
}
pyro.set_rng_seed(0)
runs = {name: [algorithm.run() for _ in range(RUNS)] for name, algorithm in algorithms.items()}


def lemon(posterior):
    """The posterior probability that the object is a lemon."""
    return sum(p for text, p in posterior.table("z") if text.startswith(" lemon."))


truth, unweighted = (sum(x[i].item() for i, name in enumerate(names) if name == "lemon") for x in (p, q))
figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
for row, posteriors in enumerate(runs.values()):
    axis.plot([lemon(r) for r in posteriors], [row] * RUNS, "o", alpha=0.5)
axis.axvline(truth, color="black", linewidth=1, label="truth")
axis.axvline(unweighted, color="black", linewidth=1, linestyle=":", label="mask without weights")
axis.set_yticks(range(len(runs)), runs)
axis.set(xlabel=f"P(lemon), {RUNS} runs of {N} particles", xlim=(-0.02, 1.02), ylim=(2.5, -1.2))
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False, ncols=2, loc="upper left")
plt.show()

# %% [markdown]
# With weights the mask gives the answer of the condition. The answers are spread widely, since the mask proposes
# any object, and few can be sliced: a guide that is trained on the condition would do better.
#
# ## How do we know?
#
# Evidence estimates are unbiased, whatever proposes. So their mean over the runs has to be the exact evidence, up
# to five standard errors. The effective sample size (of SMC the smallest on the way, before resampling evens out
# the weights) says how many independent draws a run is worth.

# %%
for name, posteriors in runs.items():
    ratios = torch.stack([r.log_evidence.double() - log_evidence for r in posteriors]).exp()
    error = ratios.std() / RUNS**0.5
    ess = torch.stack([getattr(r, "min_ess", r.ess) for r in posteriors]).mean()
    print(f"{name}: estimate / truth {ratios.mean():.3f} +- {error:.3f}, ESS {ess:.1f} of {N}")
    assert abs(ratios.mean() - 1) < 5 * error

assert abs(q.sum() - 1) < 1e-4  # the mask is a distribution: it renormalises at every token
assert distance > 0.5  # and another one than the condition

# %% [markdown]
# ## Which one do you want?
#
# Use a mask where the form matters and the free model would rarely miss it, or as a proposal. Use a condition where
# the answer should be what the model believes, given that it has the form. For a constraint too slow to ask about
# every token (a parser, a program, another model) there is `Check`, which asks about candidates only.
#
# ## What to read next
#
# - [Constraints](../constraints.md): regular expressions, JSON schemas, grammars, word lists, checks.
# - [Constrained and contrastive generation](../constrained.md): conditions on whole texts, with trained guides.
# - [Tools](../tools.md): tokens that are looked up, not drawn.
# - [Can this be trusted?](trust.ipynb): what to do where the truth is not known.
