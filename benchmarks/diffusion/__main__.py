"""Infilling by unmasking beside the exact posterior of texts: docs/diffusion.md.

    python -m benchmarks.diffusion

Every unit of work (a cell and a seed) is one JSON file under --runs: the committed records, from which the page is
made, unless another folder is named. The same command runs what is not there yet.
"""

from __future__ import annotations

from benchmarks import diffusion
from benchmarks.paper import runner

PREAMBLE = """# Masked diffusion language models

**The question.** A masked language model fills the gaps of a text word by word, in any order. What it gives to a *text*
is a sum over all orders, which nobody can write down for long texts. Can it be a sample site all the same, with the
algorithms of this package unchanged?

**What came out.** Yes, with the *path* of unmasking steps as the site's value: importance sampling, SMC between
denoising steps, enumeration, Metropolis moves, VarGrad and relative trajectory balance run on it as they are, and agree
with sums over all paths (`tests/distributions/test_unmasking.py`,
`tests/inference/samplers/test_unmasking_samplers.py`; a trained guide within a total variation of 0.04 there).
On the embedded stories training hardly paid. Untrained, the masked language model fills a middle given both ends at a
total variation of {untrained} from the exact posterior, a mean over {stories} unseen stories (without the end:
{prior}). 300 steps of Linex change that by {linex_gain}, of VarGrad by {vargrad_gain} (95% intervals over stories); on
stories whose pairs of place and verb are trained on, where it begins at {untrained_seen}, by {linex_gain_seen} and
{vargrad_gain_seen}. A causal guide, which understands no end before its training, is at {causal} of its own posterior
after as many steps. Resampling between denoising steps did not help.

**What it cost.** {seeds} seeds, {hours:.2f} core-hours; a training of 300 steps {vargrad_tokens} million tokens, of the
causal guide {causal_tokens} million.

    python -m benchmarks.diffusion     # runs what is missing of the records, and writes this page
    lmppl compare diffusion            # the algorithms beside each other, with a picture

## A path is the value

```python
from lmppl import MaskedLanguageModel
from lmppl.distributions import Unmasking

lm = MaskedLanguageModel.embedded("masked_stories")
d = Unmasking(lm, lm.join(lm.encode("Tom went to the attic."), lm.gap(6), lm.encode(" He oiled it.")))
path = d.sample()  # (6,) steps: which gap was filled, and by which word
lm.decode(d.fill(path)), d.log_prob(path)
```

A canvas is a text some of whose tokens are masks. A step chooses an open hole i and a word w for it:

    p(path) = product over t of  pi(i_t | x_t) p(w_t | x_t, i_t)        x_t: the canvas as far as it is filled

The order pi is "random", "left-to-right", "confidence" (in proportion to the probability of a hole's likeliest word),
"learned" (in proportion to the network's odds of a word against the mask, an output that masked language models have
and do not use), or a function. The mask is never drawn, and `allowed` says which words each hole may get.

So a path's log-probability is exact and differentiable, and u = log p - log q of a path is exact, with q another
network on another canvas: one that sees more. VarGrad and trajectory balance apply as they are, as Venkatraman et al.
found for diffusion models ([arXiv 2405.20971](https://arxiv.org/abs/2405.20971)). A path is written as a text of n
symbols, hole times V plus word, that keeps the promise `Stepwise` ([extending.md](extending.md)): SMC resamples between
denoising steps, `Enumeration` searches the tree of paths, `MetropolisHastings` regrows their ends. Tables decode a path
to what it writes, which sums over paths.

`log_prob` of R paths reads R n texts, equal ones once, in passes within `lm.token_budget`; a causal language model
reads R. That is the price: of a path of six words over a story of 16 tokens, 96 tokens with gradient instead of 16.

## The text's own probability

What is still to be filled depends on *which* holes are filled, not on their order. So the sum over n! orders is one
over 2^n subsets:

    f(S) = sum over i in S of  f(S - i) pi(i | x_(S - i)) p(w_i | x_(S - i), i),        p(text) = f(all)

`d.text_log_prob(words)` is that, up to 16 holes, with gradient; from left to right there is one path, and no limit.
Beyond, it is bounded from both sides by what is there: "the path writes this text" is a factor, a guide that is allowed
nothing but its words draws the order, `Sandwich` bounds the evidence, and where the model wrote the text itself, the
path by which it did is the exact sample that the upper bound needs.

On 100 middles a seed that the embedded masked language model wrote itself, log p of a text is {text} on average and of
its path {path}, the difference being log 720 = 6.579 nearly. The last table below has the bounds: from one path already
within thousandths of a nat, since this network hardly minds the order. Resampling does: the weights on the way say
which words were easy, so that orders survive which begin with easy words, and the hard words are still to come.
`ess_threshold=0` is the better bound here.

## Infilling

`lmppl compare diffusion`, `lmppl train diffusion`: the middle sentence of a story, of as many words as were told. The
model unmasks it after the beginning, and a causal language model reads the end:

    z ~ Unmasking(x ______),    y ~ LM(x z) observed

The guide is the same masked language model with an adapter, on a canvas that has the end behind the gap. It was never
taught this posterior, and yet it starts near it: having read stories with gaps anywhere, it fills the middle given both
ends. Beside it the causal guide of [infilling.md](infilling.md), trained by as many steps of as many draws. Their
targets differ, since the priors do, and each is held against its own.

In the study model and guide unmask from left to right (`--set order=left-to-right`): a text has one path, so that the
exact posterior is a sum over the 1,152 middles of the stories' grammar. In random order, with its 720 paths a text, the
untrained guide is as near: {random} for {in_order} on the same {summed} stories. Stories are of two kinds: *unseen*,
whose pairs of place and verb no training story has, and those that guides are *trained on*. The recipe is that of the
command, 4 stories x 8 paths a step, rate 1e-3, rank 16; TV is that of texts; u, ESS and log Z are of 64 draws, and a
weight of zero counts as u = -50. Texts outside the grammar hold {outside} of the posterior, by weighted draws.

- *What the network knows both ways needs no training.* It is near the posterior for the reason that a causal language
  model is not: it has read endings before middles. What is left is the difference between two networks, of how likely
  each of the two objects is that a verb happens to, in this place.
- *VarGrad descends what a few bad draws weigh.* sd(u) falls from {sd} to {vargrad_sd} by it, and texts come no
  nearer. A draw several nats below the others counts by its square there, in Linex by at most 1/N. Linex was taken
  for that reason, and by pilots (seed 11, validation stories): of VarGrad and Linex in random order and from left to
  right, of rates 1e-3 and 3e-3, and of 4 stories x 8 paths and 16 x 4, it was ahead at 1e-3 and 4 x 8. Order and batch
  changed little, and the larger rate lost on unseen pairs what it won on others.
- *What is learnt of one pair tells little of another.* Trained on eight stories alone the guide comes to {few_seen} of
  their posterior, and goes to {few} on unseen ones. So neither the adapter nor the objective is in the way: 300 steps
  show each of 538 pairs of place and verb twice, and what they teach of seen pairs does not carry over to others.
- *SMC is worse than importance sampling* from the guide, and no better from the prior: its error of log Z is {smc} and
  {prior_smc}, for {error} and {prior_error}. The end enters the weights only once all words are
  there, and until then they pull towards the prior. A flow as twist needs a stop, which paths have not; a twist of
  one's own can read the text as far as it is filled (`d.fill`).
- *The causal guide* is at {causal} on unseen pairs and {causal_seen} on those it was trained on. It is the better
  choice for this task: a text that is read once says all about each of its tokens, where a path is as many texts as it
  has steps. Its posterior is easier, too: its prior hardly knows what a place offers ([infilling.md](infilling.md)), so
  that unseen pairs of place and verb are no test of it, as they are here.

## The embedded masked language model

`python -m worlds.build masked_stories --seed 0 --out DIR` trained it: a BERT of two layers of width 64 (0.5 MB), on
stories and their first two sentences with k of n words masked, k evenly from 1..n, of some of the sentences. Its loss
is the mean of -log p(path) over random orders, word by word. Its words have the ids of the causal story LM's. 4,000
steps of 128 rows took 290 seconds on a part of a core; on 64 test stories it gives 0.94 to objects that the verb
happens to, 0.95 to verbs that happen to the object, and 0.78 to objects that the place offers, where the causal one has
0.56.

## What this does not show

- Any masked language model of transformers can be wrapped (`tests/language_model/test_masked_language_model.py` has
  BERT, DistilBERT, RoBERTa and ModernBERT, random and tiny); none that was pretrained was tried.
- {stories} unseen stories, and a recipe that was not tuned beyond the choice of the objective.
- Nothing is kept between steps: a masked language model reads the whole text anew for each word.
- Words are drawn one at a time. Several at once would be fewer passes and another distribution.

"""


def main() -> None:
    studies = diffusion.STUDIES
    parser = runner.options(__doc__, studies, seeds=3, jobs=1, runs=str(diffusion.RECORDS), out="docs/diffusion.md")
    a = parser.parse_args()
    runner.run("benchmarks.diffusion", PREAMBLE, a, runner.chosen(parser, a, studies))


if __name__ == "__main__":
    main()
