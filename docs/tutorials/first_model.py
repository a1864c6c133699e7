# %% [markdown]
# # Your first text model
#
# A story has lost its middle sentence:
#
# > Tom went to the kitchen. [...] He sliced it.
#
# Which sentences may have stood there, and with which probability? In this tutorial you write this question as a
# Pyro program whose latent variable is a text. You answer it in four ways: exactly, by importance sampling, by
# sequential Monte Carlo, and with a trained guide. At the end you see how good each answer is.

# %%
import matplotlib.pyplot as plt
import pandas
import pyro
import torch
from IPython.display import Image
from peft import LoraConfig

import lmppl
from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import SMC, Enumeration, GFlowNet, Importance, compare, plot_ancestry

# %% [markdown]
# ## A language model is a distribution over texts
#
# `LanguageModel` holds a Hugging Face causal language model and its tokenizer. The package ships a few small ones.
# This one was trained on stories of three sentences. `LanguageModel.from_pretrained("gpt2")` loads any other.

# %%
lm = LanguageModel.embedded("stories")
print(f"{sum(p.numel() for p in lm.parameters()):,} parameters, {lm.vocab_size} tokens")

# %% [markdown]
# `Completion` is the distribution of the text that follows a prompt. It is a Pyro distribution, so it has `sample`
# and `log_prob`. A text is a tensor of token ids, padded on the right with -1. `lm.encode` makes one from a string,
# and `lm.decode` makes a string from one.

# %%
pyro.set_rng_seed(0)
middle = Completion(lm, "Tom went to the kitchen.", max_tokens=7, stop=".")
draws = middle.sample((5,))
print(draws[0])
for text, log_p in zip(lm.decode(draws), middle.log_prob(draws), strict=True):
    print(f"log p = {log_p:.2f}: {text}")

# %% [markdown]
# ## The model
#
# The middle `z` follows the beginning `x`. The ending `y` follows both, and it is observed. `lm.join` puts texts
# one after another. The second site has `stop=None` and exactly as many tokens as `y`: it says that the story goes
# on with `y`, whatever comes later. Each story in the plate has a posterior of its own; here there is one story.


# %%
def model(x, y):
    with pyro.plate("stories", len(x)):
        z = pyro.sample("z", Completion(lm, x, max_tokens=7, stop="."))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=y.shape[-1], stop=None), obs=y)


x, y = lm.encode(["Tom went to the kitchen."]), lm.encode([" He sliced it."])

# %% [markdown]
# ## The truth
#
# Every algorithm returns a `Posterior`: values of the latent sites, with weights. This language model is small
# enough to list nearly all middles. `Enumeration` searches the tree of tokens, the most probable first, until it
# has seen the share `mass` of the prior. What it has not seen bounds its error.

# %%
truth = Enumeration(model, mass=0.999).run(x, y)
truth

# %% [markdown]
# Some middles are nearly equally probable: how Tom got the thing says little about the ending. What counts is the
# object, the last word of `z`. `to_pandas` gives the weighted values as a table, from which you compute what you
# want to know.


# %%
def objects(posterior):
    """The posterior probability of each object."""
    table = posterior.to_pandas()
    return table.weight.groupby(table.z.str.extract(r"(\w+)\.", expand=False)).sum()


def show(answers):
    """Bars of the most probable objects, side by side."""
    table = pandas.DataFrame({name: objects(posterior) for name, posterior in answers.items()}).fillna(0)
    axis = table.nlargest(5, "truth").plot.bar(figsize=(7, 3), rot=0, xlabel="object", ylabel="posterior probability")
    axis.spines[["top", "right"]].set_visible(False)
    plt.show()


show({"truth": truth})

# %% [markdown]
# ## Importance sampling
#
# Without a guide, `Importance` draws middles from the prior and weighs each of them by how well it explains the
# ending.

# %%
N = 256
pyro.set_rng_seed(0)
prior = Importance(model, num_particles=N).run(x, y)
show({"truth": truth, "importance sampling": prior})
prior

# %% [markdown]
# The effective sample size (ESS) says what is wrong: only a few of the draws can be sliced, and these have nearly
# all the weight. Pareto k-hat, the shape of the tail of the weights, says it too: above 0.7 the weights cannot be
# relied on.
#
# ## Sequential Monte Carlo
#
# `SMC` grows all middles token by token. On the way it replaces the less promising ones by copies of the more
# promising ones. A *twist* says how promising an unfinished middle is. With `twist="stop"` it is the probability of
# the ending if the middle stopped here.

# %%
pyro.set_rng_seed(0)
smc = SMC(model, num_particles=N, twist="stop").run(x, y)
show({"truth": truth, "importance sampling": prior, "SMC": smc})
smc

# %% [markdown]
# The weights look much better, and the answer is no better. To see why, look at the ancestry of a small run that
# resamples before every token. Thick lines have a descendant at the end.

# %%
pyro.set_rng_seed(1)
plot_ancestry(SMC(model, num_particles=32, ess_threshold=1, twist="stop").run(x, y).ancestry, "ancestry.png", index=0)
Image("ancestry.png")

# %% [markdown]
# The first tokens of a middle are a pronoun, a verb and an adjective. They say nothing of the ending, so all
# particles are equally promising. Then comes the object, and before the next token one particle is copied many
# times. So the even weights at the end are those of copies. The remedy is a proposal that knows the ending when it
# chooses the object.
#
# ## A trained guide
#
# The guide is the same language model with a LoRA adapter. Its prompt shows the ending *before* the beginning. The
# language model has never seen such a prompt, so at first the guide is no better than the prior.

# %%
q = lm.with_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def guide(x, y):
    with pyro.plate("stories", len(x)):
        prompt = q.fill("Ending:{y}\nBeginning:{x}\nMiddle:", x=x, y=y)
        pyro.sample("z", Completion(q, prompt, max_tokens=7, stop="."))


guided = Importance(model, guide, num_particles=N)
pyro.set_rng_seed(0)
untrained = guided.run(x, y)
print(f"ESS before training: {untrained.ess.item():.1f} of {N}")

# %% [markdown]
# `GFlowNet` trains it, on other stories. It needs their beginnings and endings, and not their middles. Write $u$
# for the log weight of a draw, log p(z, y | x) - log q(z | x, y). If $u$ is the same number for every $z$, then $q$
# is the posterior, and the number is the log evidence. So training reduces how much $u$ varies between the draws
# for one story.

# %%
stories = lmppl.embedded.data("stories", "train")
seen = sum("the kitchen." in story.x and "sliced" in story.y for story in stories)
print(f"{len(stories)} training stories, of which {seen} slice something in the kitchen")

groups = [stories[i : i + 8] for i in range(0, len(stories), 8)]
batches = [(lm.encode([s.x for s in group]), lm.encode([s.y for s in group])) for group in groups]
gflownet = GFlowNet(model, guide, optimizer=torch.optim.AdamW(q.trainable_parameters(), lr=3e-3))
history = gflownet.fit(batches, steps=300, progress=False)

spread = pandas.Series([step["sd_u"] for step in history])
axis = spread.rolling(10).mean().plot(figsize=(7, 2.5), xlabel="step", ylabel="sd(u), nats", ylim=(0, None))
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Now the guide answers for a story that it has not seen.

# %%
pyro.set_rng_seed(0)
amortised = guided.run(x, y)
show({"truth": truth, "importance sampling": prior, "SMC": smc, "trained guide": amortised})
amortised

# %% [markdown]
# ## How do we know?
#
# One run may be lucky. So run each algorithm several times, and look at its estimates of the log evidence.
# Estimates of the evidence are unbiased, whatever proposes: their mean must be the true evidence, up to its
# standard error.

# %%
RUNS = 16
algorithms = {
    "importance sampling": Importance(model, num_particles=N),
    "SMC": SMC(model, num_particles=N, twist="stop"),
    "trained guide": guided,
}
pyro.set_rng_seed(0)
estimates = {name: torch.cat([a.run(x, y).log_evidence for _ in range(RUNS)]) for name, a in algorithms.items()}

figure, axis = plt.subplots(figsize=(7, 2.2), layout="constrained")
for row, values in enumerate(estimates.values()):
    axis.plot(values, [row] * RUNS, "o", alpha=0.5)
axis.axvline(truth.log_evidence.item(), color="black", linewidth=1, label="truth")
axis.set_yticks(range(len(estimates)), estimates)
axis.invert_yaxis()
axis.set(xlabel=f"log evidence (nats), {RUNS} runs of {N} particles")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.show()

for name, values in estimates.items():
    ratio = (values.double() - truth.log_evidence.item()).exp()
    error = ratio.std() / RUNS**0.5
    print(f"{name}: mean estimate / truth = {ratio.mean():.3f} +- {error:.3f}")
    # The enumeration left out a little of the evidence: at most so much.
    missing = (truth.log_evidence_bounds[1] - truth.log_evidence).exp().item() - 1
    assert -5 * error < ratio.mean() - 1 < 5 * error + missing

assert amortised.ess > 10 * max(prior.ess, untrained.ess)
assert estimates["trained guide"].std() < estimates["importance sampling"].std() / 3

# %% [markdown]
# The estimates of the trained guide lie close together. A point of it that lies apart is a run that drew a text to
# which the guide gives too little probability.
#
# `compare` does such a comparison in one call, and adds what each answer costs in tokens through the network. *TV*
# is the total variation from the truth: of the draws, and of the density of what proposes.

# %%
pyro.set_rng_seed(0)
comparison = compare(model, algorithms, x, y, exact=truth, repetitions=4)
assert comparison["trained guide"].density_tv < 0.2 < comparison["importance sampling"].density_tv
print(f"Training took {gflownet.training_tokens:,} tokens.")
comparison

# %% [markdown]
# The tokens of training are spent once, for all stories. They pay where there are many questions, and where nothing
# can be enumerated.
#
# ## What to read next
#
# - [Latent reasoning with an instruct model](reasoning.ipynb): the same with a chat model and thoughts.
# - [Constraints](constraints.ipynb): what a mask on tokens does, and what a condition does.
# - [Can this be trusted?](trust.ipynb): how to judge an answer where the truth is not known.
# - [Infilling](../infilling.md): this model in full, from the command line.
# - [Training](../training.md): data sets, schedules, checkpoints, early stopping.
# - [Design](../design.md): the one quantity, u, behind all algorithms.
