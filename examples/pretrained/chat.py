"""An instruct model is asked a question; its reasoning is latent, its answer observed. Which reasoning explains it?

python examples/pretrained/chat.py DIR        # a chat checkpoint, e.g. what `make smollm2` prints
"""

import sys

import pyro

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import SMC, Importance

lm = LanguageModel.from_pretrained(sys.argv[1])
ASK = "Think about the question in a few words. Do not answer it yet. Question:{x}"
NOW = "Now answer in one word."


def model(x, y=None):
    with pyro.plate("questions", len(x)):
        question = [{"role": "user", "content": lm.fill(ASK, x=x)}]
        z = pyro.sample("z", Completion(lm, lm.chat(question), max_tokens=24))
        turns = [*question, {"role": "assistant", "content": z}, {"role": "user", "content": NOW}]
        pyro.sample("y", Completion(lm, lm.chat(turns), max_tokens=4), obs=y)


x = lm.encode([" What could be red, round and good to eat?"])  # the space is part of the word's token
pyro.set_rng_seed(0)
for answer in ("Apple", "Tomato"):
    y = lm.encode([answer], stop="eos")
    prior = Importance(model, num_particles=32).run(x, y)
    smc = SMC(model, num_particles=32).run(x, y)
    print(
        f"{answer}: log p(y | x) = {smc.log_evidence.item():.2f} by SMC, {prior.log_evidence.item():.2f} by importance"
    )
    print(*(f"  {p:.2f} {z!r}" for z, p in prior.table("z", 0)[:4]), sep="\n")
