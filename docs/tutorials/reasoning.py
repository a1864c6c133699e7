# %% [markdown]
# # Latent reasoning with an instruct model
#
# An instruct model thinks about a question before it answers it. The answer is what we see; the thought is a latent
# variable, and it is a text. So we can ask:
#
# - How probable is an answer, over *all* thoughts that the model may have?
# - Which thoughts explain a given answer?
# - How much does the answer depend on the thought?
#
# The model is SmolLM2-135M-Instruct. `smollm2()` fetches it once (93 MB, needs the extra `gguf`) and returns its
# directory; any chat model of Hugging Face would do. Everything here takes some minutes on one core.

# %%
import matplotlib.pyplot as plt
import pyro
import torch

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import SMC, Importance, Sandwich, simulate
from lmppl.pretrained import smollm2

lm = LanguageModel.from_pretrained(smollm2())

# %% [markdown]
# ## A chat with a latent turn
#
# `lm.chat` is the chat template of the tokenizer. It takes the messages that you know from transformers, with one
# addition: the content of a turn may be a text, for instance a latent one.


# %%
def ask(x):
    content = lm.fill("Think about the question in a few words. Do not answer it yet. Question:{x}", x=x)
    return [{"role": "user", "content": content}]


x = lm.encode([" What could be red, round and good to eat?"])
print(lm.tokenizer.decode(lm.chat(ask(x))[0]))

# %% [markdown]
# The model is two turns of the assistant. It thinks: `z`. It is told to answer, and answers: `y`.


# %%
def model(x, y=None):
    with pyro.plate("questions", len(x)):
        question = ask(x)
        z = pyro.sample("z", Completion(lm, lm.chat(question), max_tokens=20))
        turns = [
            *question,
            {"role": "assistant", "content": z},
            {"role": "user", "content": "Now answer in one word."},
        ]
        pyro.sample("y", Completion(lm, lm.chat(turns), max_tokens=4), obs=y)


# %% [markdown]
# ## How probable is an answer?
#
# With an answer observed, the log evidence is log p(y | x): the average over thoughts. `Importance` draws thoughts
# from the model and weighs each one by the probability that it gives to the answer. An observed text needs its end,
# hence `stop="eos"`. The same seed gives both answers the same thoughts.

# %%
N = 24
posteriors = {}
for answer in ("Apple", "Tomato"):
    pyro.set_rng_seed(0)
    posteriors[answer] = Importance(model, num_particles=N).run(x, lm.encode([answer], stop="eos"))
    print(f"log p({answer} | x) = {posteriors[answer].log_evidence.item():.2f}")

# %% [markdown]
# Does it help to think? Here is the question without a thought. (Its prompt is another one, too, so this compares
# two ways of asking.)

# %%
direct = lm.chat([{"role": "user", "content": lm.fill("Answer in one word. Question:{x}", x=x)}])
with torch.no_grad():
    for answer, posterior in posteriors.items():
        without = Completion(lm, direct, max_tokens=4).log_prob(lm.encode([answer], stop="eos")).item()
        print(f"{answer}: log p = {posterior.log_evidence.item():.2f} with a thought, {without:.2f} without")

# %% [markdown]
# ## Which thoughts explain an answer?
#
# The weights say so: they are the posterior p(z | x, y). Do not expect too much of these thoughts, as the model is
# small. With a small effective sample size (ESS) the probabilities are rough; "± s.e." is the standard error of
# each.

# %%
posteriors["Apple"]

# %%
posteriors["Tomato"]

# %% [markdown]
# Both posteriors weigh the same thoughts, so they can be compared thought by thought. A thought on the diagonal
# speaks for both answers alike.

# %%
figure, axis = plt.subplots(figsize=(5, 4.2), layout="constrained")
apple, tomato = (posteriors[answer].probabilities[:, 0] for answer in ("Apple", "Tomato"))
axis.loglog(apple, tomato, "o", alpha=0.6)
limits = [float(torch.minimum(apple, tomato).min()) / 2, 1]
axis.plot(limits, limits, color="black", linewidth=1)
axis.set(xlabel="p(thought | Apple)", ylabel="p(thought | Tomato)", xlim=limits, ylim=limits)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

ratio = (tomato / apple).argsort(descending=True).tolist()
texts = [row[0] for row in posteriors["Tomato"].strings("z")]
print("for Tomato, against Apple:", *(repr(texts[i]) for i in ratio[:3]), sep="\n  ")
print("for Apple, against Tomato:", *(repr(texts[i]) for i in ratio[-3:]), sep="\n  ")

# %% [markdown]
# ## How much does the answer depend on the thought?
#
# `predict` draws new thoughts and scores candidate answers after each of them. `probabilities` averages over the
# thoughts, given that the answer is one of the candidates; `vote` counts which candidate each thought prefers. The
# entropy of the answer has two parts: what stays open when the thought is known, and what the thought tells (the
# mutual information).

# %%
pyro.set_rng_seed(1)
candidates = ["Apple", "Tomato", "Cherry"]
prediction = posteriors["Apple"].predict(model, candidates, x, sampler="prior", num_particles=12)
for name, p, vote in zip(candidates, prediction.probabilities[:, 0], prediction.vote[:, 0], strict=True):
    print(f"{name:7s} probability {p:.2f}, votes {vote:.0%}")
print(f"entropy {prediction.entropy.item():.2f} nats")
print(f"  the thought known     {prediction.expected_entropy.item():.2f}")
print(f"  told by the thought   {prediction.mutual_information.item():.2f}")

# %% [markdown]
# Where most of the entropy is left when the thought is known, the answer depends little on the thought.
#
# ## How do we know?
#
# The thoughts cannot be listed, so there is no truth to compare with. But some things must hold.
#
# First, another set of thoughts gives another estimate of the same evidence. The variance of the weights says how
# far two estimates may be apart. `SMC` draws its own thoughts.

# %%
pyro.set_rng_seed(2)
again = SMC(model, num_particles=N).run(x, lm.encode(["Tomato"], stop="eos"))
one, other = (p.log_evidence.item() for p in (posteriors["Tomato"], again))
ess = posteriors["Tomato"].ess.item()
error = (2 * (1 / ess - 1 / N)) ** 0.5  # of the difference of two estimates: relative errors add up
print(f"log p(Tomato | x): {one:.2f} and {other:.2f}, {abs(one - other):.2f} apart; standard error {error:.2f}")
print(f"ESS {ess:.1f} of {N}")
assert abs(one - other) < 5 * error

# %% [markdown]
# Second, the evidence can be bounded from both sides on data drawn from the model itself: let it think and answer.
# Its own thought is then an exact draw of the posterior, which gives an upper bound; thoughts drawn anew give a
# lower one ([Can this be trusted?](trust.ipynb) explains this). Both hold on average over such data, so take
# several: the plate makes them at once.

# %%
DATA = 4
pyro.set_rng_seed(3)
xs = x.expand(DATA, -1)
thoughts, observed = simulate(model, xs, lm.encode(["Tomato"] * DATA, stop="eos"))
bounds = Sandwich(model, num_particles=8, ess_threshold=0).run(xs, observed["y"], exact_sample=thoughts)
for thought, answer, low, high in zip(
    lm.decode(thoughts["z"]), lm.decode(observed["y"]), bounds.lower, bounds.upper, strict=True
):
    print(f"it thought {thought!r}\nand answered {answer!r}: log p(y | x) between {low:.2f} and {high:.2f}")
gap = bounds.gap.mean()
error = bounds.gap.std() / DATA**0.5
print(f"mean gap {gap:.2f} +- {error:.2f} nats")
assert gap > -5 * error

# %% [markdown]
# A single upper bound may lie below its lower bound, as both are random; their mean gap may not be negative beyond
# its error. A small gap says that few thoughts suffice.
#
# Drawing thoughts from the prior is enough as long as many thoughts lead to the answer. Where an answer needs a
# rare thought, the ESS falls to one. Then train a guide that sees the answer, as in [Your first text
# model](first_model.ipynb), with a chat template as its prompt. With a network of this size a training step takes
# seconds, not milliseconds.
#
# ## What to read next
#
# - [A pretrained model](../pretrained.md): how to get one, GGUF files, what takes how long.
# - [Checkpoints](../checkpoints.md): chat templates, ends of turns, stop strings, long contexts.
# - [Your first text model](first_model.ipynb): training a guide.
# - [Can this be trusted?](trust.ipynb): bounds and calibration.
# - [Chains of thought and their votes](../arithmetic.md): a latent rationale with a calculator.
# - [Uncertainty](../uncertainty.md): entropy of an answer, split into its sources.
