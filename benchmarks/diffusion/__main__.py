"""Infilling by unmasking, compared with the exact posterior of texts: docs/diffusion.md.

    python -m benchmarks.diffusion

Every unit of work (a cell and a seed) is one JSON file under --runs. By default these are the committed records, from
which the page is made. The same command runs the units that have no file yet.
"""

from __future__ import annotations

from benchmarks import diffusion
from benchmarks.paper import runner

PREAMBLE = """# Masked diffusion language models

**The question.** A masked language model fills the gaps of a text word by word, in any order. Its probability of a
*text* is a sum over all orders, which cannot be computed for long texts. Can it still be a sample site, with the
algorithms of this package unchanged?

**The result.** Yes, if the value of the site is the *path* of unmasking steps. Importance sampling, SMC between
denoising steps, enumeration, Metropolis moves, VarGrad and relative trajectory balance run on it without a change, and
agree with sums over all paths (`tests/distributions/test_unmasking.py`,
`tests/inference/samplers/test_unmasking_samplers.py`; there a trained guide has a total variation, TV, of at most
0.04).

On the embedded stories training was hardly worth its cost. Without training, the masked language model fills a middle
given both ends with a TV of {untrained} to the exact posterior, a mean over {stories} unseen stories (without the end:
{prior}). 300 steps of Linex change this by {linex_gain}, of VarGrad by {vargrad_gain} (95% intervals over stories). On
stories whose pairs of place and verb are trained on, the TV is {untrained_seen} without training, and the changes are
{linex_gain_seen} and {vargrad_gain_seen}. A causal guide does not understand ends before its training; after as many
steps its TV to its own posterior is {causal}. Resampling between denoising steps did not help.

**The cost.** {seeds} seeds, {hours:.2f} core-hours. A training of 300 steps reads {vargrad_tokens} million tokens, that
of the causal guide {causal_tokens} million.

    python -m benchmarks.diffusion     # runs the units without a record, and writes this page
    lmppl compare diffusion            # compares the algorithms, with a picture

## A path is the value

```python
from lmppl import MaskedLanguageModel
from lmppl.distributions import Unmasking

lm = MaskedLanguageModel.embedded("masked_stories")
d = Unmasking(lm, lm.join(lm.encode("Tom went to the attic."), lm.gap(6), lm.encode(" He oiled it.")))
path = d.sample()  # (6,) steps: which gap was filled, and by which word
lm.decode(d.fill(path)), d.log_prob(path)
```

A canvas is a text in which some tokens are masks. A step chooses an open hole i and a word w for it:

    p(path) = product over t of  pi(i_t | x_t) p(w_t | x_t, i_t)        x_t: the canvas before step t

The order pi is "random", "left-to-right", "confidence" (proportional to the probability of the hole's most likely
word), "learned" (proportional to the network's odds of a word against the mask, an output that masked language models
have and do not use), or a function. The mask itself is never drawn. `allowed` says which words each hole may get.

So the log-probability of a path is exact and differentiable. u = log p - log q of a path is exact too, where q is
another network on another canvas, which may show more. VarGrad and trajectory balance apply without a change, as
Venkatraman et al. found for diffusion models ([arXiv 2405.20971](https://arxiv.org/abs/2405.20971)). A path is written
as a text of n symbols, hole times V plus word, and keeps the promises of `Stepwise` ([extending.md](extending.md)): SMC
resamples between denoising steps, `Enumeration` searches the tree of paths, `MetropolisHastings` redraws the end of a
path. Tables decode a path to its text, and so sum over paths.

`log_prob` of R paths reads R n texts, each different one once, in passes within `lm.token_budget`; a causal language
model reads R. This is the price: a path of six words in a story of 16 tokens takes 96 tokens with gradient instead of
16.

## The text's own probability

The next step depends on *which* holes are filled, not on the order in which they were filled. So the sum over n!
orders is a sum over 2^n subsets:

    f(S) = sum over i in S of  f(S - i) pi(i | x_(S - i)) p(w_i | x_(S - i), i),        p(text) = f(all)

`d.text_log_prob(words)` computes it, with gradient, for up to 16 holes; from left to right there is one path, and no
limit. For more holes there are bounds from both sides. "The path writes this text" is a factor; a guide that is allowed
only the words of the text draws the order; `Sandwich` bounds the evidence. If the model wrote the text itself, the path
that it took is the exact sample that the upper bound needs.

For each seed the embedded masked language model wrote 100 middles. The mean of log p is {text} for the texts and {path}
for their paths; the difference is nearly log 720 = 6.579. The last table below has the bounds. One path already gives
bounds within thousandths of a nat, because the order matters little to this network. Resampling makes them worse: the
weights on the way show which words were easy, so orders survive that begin with easy words, and the hard words are
still to come. `ess_threshold=0` gives the better bound here.

## Infilling

`lmppl compare diffusion`, `lmppl train diffusion`: the middle sentence of a story, with the story's own number of
words. The model unmasks it after the beginning, and a causal language model reads the end:

    z ~ Unmasking(x ______),    y ~ LM(x z) observed

The guide is the same masked language model with an adapter, on a canvas that has the end after the gap. It was never
trained on this posterior, but it starts near it: it has read stories with gaps anywhere, so it fills the middle given
both ends. It is compared with the causal guide of [infilling.md](infilling.md), trained by as many steps of as many
draws. Their priors differ, and so do their targets; each is compared with its own.

In the study, model and guide unmask from left to right (`--set order=left-to-right`). Then a text has one path, and the
exact posterior is a sum over the 1,152 middles of the stories' grammar. In random order a text has 720 paths, and the
untrained guide is as near: TV {random}, and {in_order} from left to right on the same {summed} stories. There are two
kinds of stories: *unseen* ones, whose pairs of place and verb no training story has, and those that guides are *trained
on*. The recipe is that of the command: 4 stories x 8 paths per step, rate 1e-3, rank 16. TV is that of texts; u, ESS
and log Z are from 64 draws, and a weight of zero counts as u = -50. Texts outside the grammar have {outside} of the
posterior, estimated from weighted draws.

- *What the network knows in both directions needs no training.* It is near the posterior because it has read endings
  before middles, which a causal language model has not. The rest is the difference between two networks in how likely
  each of the two objects is that a verb can happen to, in this place.
- *VarGrad reduces the effect of a few bad draws.* sd(u) falls from {sd} to {vargrad_sd}, but the texts come no
  nearer. In VarGrad a draw several nats below the others counts by its square, in Linex by at most 1/N. Linex was
  chosen for this reason, and by four pilots that were not kept (seed 11, validation stories): VarGrad in random order
  and from left to right, which were equally good; Linex from left to right with 4 stories x 8 paths at rate 1e-3,
  which was the best; and Linex with 16 x 4 at 3e-3, which was no better on trained pairs and worse on others.
- *What is learnt about one pair says little about another.* If the guide is trained as long on only eight stories
  (seeds: {few_seeds}), its TV to their posterior is {few_seen}, and {few} on unseen stories. So neither the adapter
  nor the objective is the obstacle. 300 steps of 4 stories show each of 538 pairs of place and verb about twice, and
  what is learnt about these pairs does not transfer to others.
- *SMC is worse than importance sampling* from the guide, and no better from the prior: its errors of log Z are {smc}
  and {prior_smc}, those of importance sampling {error} and {prior_error}. The end enters the weights only when all
  words are there; until then the weights pull towards the prior. A flow as twist needs a stop, which paths do not
  have. Your own twist can read the text that is filled so far (`d.fill`).
- *The causal guide* has a TV of {causal} on unseen pairs and {causal_seen} on those that it was trained on (seeds:
  {causal_seeds}). It is the better choice for this task: reading a text once gives the probabilities of all its tokens,
  while a path needs one text for each of its steps. Its posterior is also easier: its prior hardly knows what a place
  offers ([infilling.md](infilling.md)), so unseen pairs of place and verb do not test it as they do here.

## The embedded masked language model

`python -m worlds.build masked_stories --seed 0 --out DIR` trained it: a BERT of two layers of width 64 (0.5 MB), on
stories and on their first two sentences. In some of the sentences k of n words were masked, k uniform on 1..n. The
loss is the mean of -log p(path) over random orders, for each word. Words have the same ids as in the causal story
language model. 4,000 steps of 128 rows took 290 seconds on a part of a core. On 64 test stories it gives 0.94 of its
mass to objects that the verb happens to, 0.95 to verbs that happen to the object, and 0.78 to objects that the place
offers (the causal model: 0.56).

## What this does not show

- Any masked language model of transformers can be wrapped (`tests/language_model/test_masked_language_model.py` has
  tiny random BERT, DistilBERT, RoBERTa and ModernBERT), but no pretrained one was tried.
- There are {stories} unseen stories, and only the objective of the recipe was chosen by trials.
- Nothing is kept between steps: a masked language model reads the whole text again for each word.
- Words are drawn one at a time. Several at once would need fewer passes, and would be another distribution.

"""


def main() -> None:
    studies = diffusion.STUDIES
    parser = runner.options(__doc__, studies, seeds=3, jobs=1, runs=str(diffusion.RECORDS), out="docs/diffusion.md")
    a = parser.parse_args()
    runner.run("benchmarks.diffusion", PREAMBLE, a, runner.chosen(parser, a, studies))


if __name__ == "__main__":
    main()
