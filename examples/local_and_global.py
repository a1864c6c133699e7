"""A mask on each next token and a condition on the whole text are different posteriors: exactly, and by sampling."""

import pyro
import torch

from lmppl import LanguageModel, text
from lmppl.constraints import Check, ban, every, regex
from lmppl.distributions import Completion
from lmppl.inference import SMC, Enumeration, Importance

lm = LanguageModel.embedded("stories")
beginning = "Tom went to the kitchen. He took the small"
ending = r" [a-z]+\. He sliced it\."
constraint = every(regex(lm, ending, stop=None), ban(lm, [" "]))  # this vocabulary spells no word after a lone space


def story(allowed=None):  # six tokens: an object, a full stop, and a sentence
    return Completion(lm, beginning, max_tokens=6, stop=None, allowed=allowed)


def condition():  # the whole text must match
    z = pyro.sample("z", story())
    pyro.factor("condition", constraint.log_indicator(z))


def mask():  # each token must leave a match possible
    pyro.sample("z", story(constraint))


# Exactly.  The mask lets through what the condition accepts, so the two have one support.
local = Enumeration(mask).run()
z = local.samples["z"]  # (K, 6)
with torch.no_grad():
    log_p = story().log_prob(z).double()
posterior, masked = log_p.softmax(0), local.log_weights.exp()
print(f"{len(z)} texts match, with probability {log_p.exp().sum():.4f}; the mask's probabilities add up to", end=" ")
print(f"{masked.sum():.4f}\n{'object':10s} {'condition':>9s} {'mask':>9s} {'weight':>9s}")
for i in [*posterior.argsort(descending=True)[:4].tolist(), *masked.argsort(descending=True)[:4].tolist()]:
    name = lm.decode(z[i]).split(".")[0].strip()
    print(f"{name:10s} {posterior[i]:9.4f} {masked[i]:9.4f} {log_p[i].exp() / masked[i]:9.1e}")
print(f"total variation {(posterior - masked).abs().sum() / 2:.2f}")

# By sampling.  The mask proposes; each token's weight is the mass that the mask kept.
pyro.set_rng_seed(0)
algorithms = {
    "importance sampling from the prior": Importance(condition, num_particles=10_000),
    "importance sampling from the mask": Importance(condition, mask, num_particles=10_000),
    "SMC with the mask": SMC(condition, mask, num_particles=10_000),
}
for name, algorithm in algorithms.items():
    found = algorithm.run()
    share = sum(p for s, p in found.table("z") if s.startswith(" lemon"))
    print(f"{name}: evidence {found.log_evidence.exp():.4f}, lemon {share:.2f}")


# A check too costly to ask about all tokens: it sees the whole string, and is asked about candidates only.
def no_letter_twice_in_a_row(prefix, token):
    return text.map(lambda s: all(a != b for a, b in zip(s, s[1:], strict=False)), text.cat(prefix, token[:, None]), lm)


check = Check(lm, no_letter_twice_in_a_row)


def any_story():
    pyro.sample("z", Completion(lm, beginning, max_tokens=6, stop=None))


def checked():
    pyro.sample("z", Completion(lm, beginning, max_tokens=6, stop=None, allowed=check))


found = SMC(any_story, checked, num_particles=200, ess_threshold=0.0).run()
asked, tokens = check.evaluations, 200 * 6
print(f"check: {asked} candidates for {tokens} tokens of a vocabulary of {lm.vocab_size};", end=" ")
print(f"it keeps {found.log_evidence.exp():.2f} of the mass")
