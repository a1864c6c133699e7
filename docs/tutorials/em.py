# %% [markdown]
# # Learning the model too: variational EM
#
# So far the language model was right, and only the latent texts were unknown. Here the model itself is wrong in part,
# and its latents are never seen.
#
# **What we want to know.** A sentence about a film is called objective or subjective, for a *reason* that nobody
# wrote down. The language model knows good reasons for a sentence, but it misreads four of the twelve: from these it
# draws the wrong label. We have forty sentences with their labels. Can it learn what the reasons mean, without being
# told the reason of any sentence?

# %%
import matplotlib.pyplot as plt
import pyro
import torch
from peft import LoraConfig

from lmppl import LanguageModel, embedded
from lmppl.constraints import only
from lmppl.distributions import Completion
from lmppl.embedded.subjectivity import OBJECTIVE, REASONS, SUBJECTIVE
from lmppl.inference import Enumeration, GFlowNet, VariationalEM

torch.set_num_threads(1)
torch.manual_seed(0)
pyro.set_rng_seed(0)
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

lm = LanguageModel.embedded("subjectivity")
for sentence in embedded.data("subjectivity", "train")[:3]:
    print(f"{sentence.text}   ({sentence.label})")
print("the twelve reasons:", *REASONS)

# %% [markdown]
# ## The model
#
# A reason $z$, one word, follows "... because of", and the label $y$ follows the reason. An adapter `p` of the same
# language model gives the label. A new adapter changes nothing: it starts as the language model itself. EM moves `p`
# and nothing else.

# %%
reason = dict(min_tokens=1, max_tokens=1, stop=",", allowed=only(lm, [*REASONS, ","]))
label = dict(max_tokens=1, stop=None, allowed=only(lm, [" objective", " subjective"]))
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


def labels_by(p):
    def model(x, y):
        with pyro.plate("sentences", len(x)):
            z = pyro.sample("z", Completion(lm, lm.fill("{x} because of", x=x), **reason))
            pyro.sample("y", Completion(p, p.fill("{x} because of{z}", x=x, z=z), **label), obs=y)

    return model


def encode(sentences):
    return lm.encode([s.text for s in sentences]), lm.encode([f" {s.label}" for s in sentences])


train, test = (encode(embedded.data("subjectivity", split)[:n]) for split, n in (("train", 40), ("test", 60)))

# %% [markdown]
# There are twelve reasons, so that everything can be known exactly: `Enumeration` returns $\log p(y \mid x)$ and the
# posterior of the reason. A prediction is right where $p(y \mid x) > 1/2$.


# %%
def on_test(p):
    found = Enumeration(labels_by(p)).run(*test)
    right = (found.log_evidence.exp() > 0.5).float().mean()
    print(f"log p(y | x) {found.log_evidence.mean():.3f} nats a sentence, {right:.0%} right; a coin: -0.693, 50%")
    return found


before = on_test(lm)
print(f"\n{lm.decode(test[0][0])} --{lm.decode(test[1][0])}")
for z, probability in before.table("z", 0)[:4]:
    print(f"   {probability:.2f} {z}")

# %% [markdown]
# ## EM, exactly
#
# A round has two steps. The *E-step* infers the reasons with the model held fixed. The *M-step* raises
# $Q = \sum_n w_n \log p(z_n, y)$ over the adapter, with the reasons $z_n$ and their probabilities $w_n$ held fixed.
# With the exact posterior as its E-step, EM raises $\log p(y \mid x)$ itself. `backtrack=True` halves a step that is
# too long, so that no round can make it smaller.

# %%
p = lm.with_adapter(config)
model = labels_by(p)
exact = Enumeration(model)
em = VariationalEM(model, None, exact, torch.optim.AdamW(p.trainable_parameters(), lr=1e-2), backtrack=True)
history = em.fit([train], steps=10, progress=False)
after = on_test(p)

# %% [markdown]
# What has it learned? The sentences were made from reasons, which EM has never seen. We give the model each test
# sentence with its true reason and ask for the label. Objective reasons should give a low bar, subjective ones a high
# one.

# %%
sentences = embedded.data("subjectivity", "test")[:200]
kinds = [s.kind for s in sentences]
true_reasons = lm.encode([f" {kind}" for kind in kinds], stop=",")


@torch.no_grad()
def reading(p):
    """p(subjective | x, true reason), averaged over the sentences of each reason."""
    prompts = p.fill("{x} because of{z}", x=lm.encode([s.text for s in sentences]), z=true_reasons)
    subjective = Completion(p, prompts, **label).log_prob(lm.encode(" subjective")).exp()
    return [subjective[torch.tensor([kind == r.strip() for kind in kinds])].mean().item() for r in REASONS]


def misread(probabilities):
    return [r.strip() for r, q in zip(REASONS, probabilities, strict=True) if (q > 0.5) != (r.strip() in SUBJECTIVE)]


read = {"before EM": reading(lm), "after EM": reading(p)}
fig, ax = plt.subplots(figsize=(8, 3))
ax.axvspan(-0.5, len(OBJECTIVE) - 0.5, color="#ccbb44", alpha=0.15)
for i, (name, probabilities) in enumerate(read.items()):
    print(f"{name} misread: {', '.join(misread(probabilities)) or 'none'}")
    ax.bar(torch.arange(12) + 0.4 * (i - 0.5), probabilities, 0.4, label=name, color=("#aaaaaa", "#4477aa")[i])
ax.axhline(0.5, color="black", linewidth=0.7)
ax.set_xticks(range(12), [r.strip() for r in REASONS])
ax.set(ylabel="p(subjective | x, reason)", ylim=(0, 1), xlim=(-0.5, 11.5), xlabel="objective reasons shaded")
ax.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
plt.show()

# %% [markdown]
# The adapter reads the sentence as well as the reason. It may therefore learn a label from the words of the sentence
# instead; EM only asks for a probable label.

# %% [markdown]
# ## EM with a trained guide
#
# Most models cannot be enumerated. A second adapter `q` reads the label first and learns to give the reason: a
# GFlowNet is the E-step now. Each round updates it twice; then its draws, weighed by importance, are what the M-step
# sees. `exact=` only logs the truth beside it.
#
# Guide and likelihood have an adapter each. With one for both the M-step would move the guide too; that is refused.

# %%
p_trained, q = lm.with_adapter(config), lm.with_adapter(config)
model_trained = labels_by(p_trained)


def guide(x, y):
    with pyro.plate("sentences", len(x)):
        pyro.sample("z", Completion(q, q.fill("{y}.\n{x} because of", x=x, y=y), **reason))


e_step = GFlowNet(model_trained, guide, optimizer=torch.optim.AdamW(q.trainable_parameters(), lr=3e-3))
m_optimizer = torch.optim.AdamW(p_trained.trainable_parameters(), lr=1e-2)
trained = VariationalEM(model_trained, guide, e_step, m_optimizer, e_steps=2, exact=Enumeration(model_trained))
batches = [tuple(t[i : i + 10] for t in train) for i in range(0, 40, 10)]
rounds = trained.fit(batches, steps=20, progress=False)
after_trained = on_test(p_trained)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].plot([row["log_evidence"] / 40 for row in history], marker="o", markersize=3)
axes[0].set(xlabel="round of exact EM", ylabel="nats a sentence", title="log p(y | x) of all forty: never falls")
for name, key in {"log p(y | x)": "log_likelihood", "the guide's estimate": "log_evidence", "its ELBO": "elbo"}.items():
    axes[1].plot([row[key] / 10 for row in rounds], label=name, linewidth=1)
axes[1].set(xlabel="round of EM with a trained guide", title="ten sentences a round", ylim=(-1.3, 0))
axes[1].legend(frameon=False, fontsize=8, loc="lower right")
fig.tight_layout()
plt.show()

# %% [markdown]
# The distance between $\log p(y \mid x)$ and the ELBO is the divergence of the guide from the posterior, which it has
# to follow while the model moves.
#
# ## How do we know that it is right?
#
# The evidence of all forty sentences by plain PyTorch: one pass over the twelve reasons of each, and not a line of
# inference.


# %%
def log_evidence(x, y):
    """log p(y | x) (B,), with gradient to the adapter p."""
    reasons = torch.tensor([lm.token_id(word) for word in REASONS])
    labels = torch.tensor([lm.token_id(word) for word in (" objective", " subjective")])
    comma, found = lm.token_id(","), []
    for sentence, said in zip(lm.decode(x), y[:, 0], strict=True):
        prompt = lm.encode(f"{sentence} because of")
        rows = torch.cat([prompt.expand(12, -1), reasons[:, None], torch.full((12, 1), comma)], 1)
        log_z = lm(rows).logits[0, len(prompt) - 1, reasons].log_softmax(0)  # (12,): a reason after the prompt
        log_y = p(rows).logits[:, -1, labels].log_softmax(1)  # (12, 2): a label after the comma
        found.append((log_z + log_y[:, labels == said][:, 0]).logsumexp(0))
    return torch.stack(found)


plain = log_evidence(*train)
difference = (plain - exact.run(*train).log_evidence).abs().max().item()
print(f"largest difference of log p(y | x): {difference:.1e} nats")

# %% [markdown]
# Fisher's identity: with the exact posterior the M-step's gradient of $Q$ *is* the gradient of $\log p(y \mid x)$. A
# step of plain gradient ascent with a rate of one moves the adapter by the first; PyTorch computes the second.

# %%
theta = p.trainable_parameters()
gradient = torch.autograd.grad(plain.sum(), theta)
start = [t.detach().clone() for t in theta]
VariationalEM(model, None, exact, torch.optim.SGD(theta, lr=1.0)).step(*train)
moved = [t.detach() - s for t, s in zip(theta, start, strict=True)]
with torch.no_grad():
    for t, s in zip(theta, start, strict=True):
        t.copy_(s)
size = torch.cat([g.flatten() for g in gradient]).norm()
error = torch.cat([(g - m).flatten() for g, m in zip(gradient, moved, strict=True)]).norm() / size
print(f"relative difference of the two gradients: {error:.1e}")

# %% [markdown]
# The claims of this page, as assertions. The test sentences are paired, so that the gain in $\log p(y \mid x)$ is
# held against its own standard error.

# %%
assert difference < 1e-3 and error < 1e-3
climb = torch.tensor([row["log_evidence"] for row in history]).diff()
assert climb.min() > -1e-3, "a round of exact EM made the evidence smaller"
for found in (after, after_trained):
    gain = found.log_evidence - before.log_evidence
    error_of_gain = gain.std() / len(gain) ** 0.5
    print(f"gain {gain.mean():.3f} nats a sentence, standard error {error_of_gain:.3f}")
    assert gain.mean() > 5 * error_of_gain
assert len(misread(read["after EM"])) < len(misread(read["before EM"]))

# %% [markdown]
# ## What to read next
#
# - [Variational EM](../em.md): other E-steps, mini-batches, what is logged.
# - [Subjectivity](../subjectivity.md): this model as the paper has it, with its figures.
# - [Uncertainty](../uncertainty.md): where an answer's uncertainty comes from, reasons or parameters.
# - [Training](../training.md): checkpoints, schedulers and early stopping, which `VariationalEM.fit` has too.
