"""Does a model know when it does not know: docs/uncertainty.md.

    python -m benchmarks.uncertainty --seeds 5

Every unit of work (a cell and a seed) is one JSON file under --runs. The same command continues an interrupted run.
"""

from __future__ import annotations

from benchmarks import uncertainty
from benchmarks.paper import runner

PREAMBLE = """# Uncertainty: does it know when it does not know?

A model answers through a chain of thought. Does its uncertainty show where the answer is wrong? And is it useful to
split it into parts that come from chance, from chains and from parameters? Figures of five seeds on the embedded
sentences, where every sum is exact:

- **It finds errors if it is averaged over chains.** With 10 labels AUROC of its own errors is 0.79 by all chains of
  one adapter and 0.81 of five, 0.71 by self-consistency votes, 0.69 by one chain, 0.65 by the direct answer of one
  adapter and 0.70 of five. The surer half of the sentences is 95.5% right with five adapters, 89.2 by votes, 79.1
  directly. Votes of 32 chains are unanimous on most sentences, also on wrong ones. 32 chains of p(z|x) are better than
  32 of the guide (0.77 and 0.69). Five samples of SGLD, one run of 200 steps, are about as good as one EM run (0.78,
  with the best log score of all, -0.50). Seeds differ much: of eight such comparisons two hold at 95%, both at 50
  labels. This is weak evidence, with fifteen claims in all.
- **It is overconfident.** ECE is 0.14 with 10 labels, where chance alone would give 0.03, and 0.27 for the direct
  answer.
- **The parts find the same things.** We expected that parameter information finds what was not learnt. It does (kinds
  without a label 0.81), but so do expected entropy and chain information (0.82, 0.83), and each part finds errors as
  well as their sum (0.78 to 0.81). Five EM runs disagree little, by 0.03 nats. It was not tested whether the reason is
  that each fits its ten labels completely.
- **It does not recognise nonsense.** No part of five adapters' entropy separates shuffled sentences, or sentences of
  three kinds, well from test sentences (0.53 to 0.65; three kinds by samples of SGLD 0.74). Expected entropy finds
  idle words (0.93). log p(x) of the language model finds all three (0.96 to 1.00) and no errors (0.55).
- **With few chains the plug-in estimate is wrong.** With two chains per member, parameter information comes out at
  0.070 nats instead of 0.030, chain information at 0.048 instead of 0.100. The jackknife gives 0.034 and 0.096.

Written by `make uncertainty` (`python -m benchmarks.uncertainty`): {seeds} seeds, {hours:.1f} core-hours.

## What is computed

An answer y follows from x through a chain z, under parameters theta that training leaves uncertain: J adapters with
weights pi. The model averages over both,

    p(y|x) = sum_j pi_j sum_z p_j(z|x) p_j(y|x, z)

and its entropy is the sum of three parts in nats, none of them negative:

    entropy                H[p(y|x)]
      = expected entropy         mean over theta, z of H[p(y|x, z, theta)]   what is left if both are known
      + chain information        mean over theta of I(y; z | x, theta)       what the chain would tell
      + parameter information    I(y; theta | x)                             what the parameters would tell

```python
members = [task.predict(x) for task in tasks]  # a `Prediction` per adapter: here the sum over all 156 chains
found = Ensemble.of(members)  # is a `Prediction` too: .probabilities, .vote
found.split().parameter_information  # (sentences,)

drawn = Ensemble.of([task.predict(x, num_particles=8) for task in tasks])
drawn.jackknife().parameter_information  # from 8 chains per adapter
```

Members may be any `Prediction` of the same candidates: `posterior.predict(model, candidates, x)` of any Pyro program,
EM runs from several seeds, prompts, or samples of one adapter's parameters by the optimiser `SGLD`. Scores of
forecasts are in `lmppl.models.forecasts`.

`lmppl compare uncertainty` trains three adapters on ten labels (`--set count=50 --set members=5`: five on fifty). It
shows the parts of the entropy of right and of wrong answers, draws them for every sentence (`uncertainty.png`), and
shows all that `lmppl compare subjectivity` shows.

**The error of few chains.** Entropy is concave, so the entropy of an average of S draws is too small, by (1 / 2S)
sum_c Var_z p(c|z) / p(c) to first order. Therefore chain information is too small (with one chain it is zero), and
parameter information is *too large*: members that drew different chains look like members that disagree. In the last
table below it is more than twice the exact value with two chains. The jackknife leaves out each chain in turn and
removes the first order; the rest is O(1 / S^2), tested by a sum over all possible samples. It does not make the
estimate of one sentence less noisy.

## On SmolLM2

SmolLM2-135M-Instruct with the prompts and 300 sentences of [results-pretrained.md](results-pretrained.md), ten chains
for each. AUROC of an answer's own errors by its entropy, with 95% intervals over sentences:

- untrained 0.72 (0.66 to 0.78) by chains, 0.73 (0.66 to 0.79) by the direct answer;
- at 10 labels 0.75 (0.67 to 0.82) by chains of GFlowNet + EM, which are right on 84.7%, and 0.81 (0.76 to 0.86) by the
  direct answers of supervised adapters, right on 76.0%.

The result on the embedded sentences is not seen here: with labels, chains are right more often, but their uncertainty
does not find their errors better. Each answer is judged by its own errors, and chains have fewer of them; also, ten
chains are few. `python -m benchmarks.paper_pretrained --only uncertainty` makes the table.

## What is compared

The sentences, chains and labels of [subjectivity](subjectivity.md): p(y|x, z) follows one of 156 chains, so every
sum is exact. A member is an adapter that exact EM trained on 10 or 50 labelled sentences; five members have
different first weights. *Direct* is an adapter trained on log p(y|x) with the prompt "{{x}} is" and no chain. *The
guide* is q(z|x) of a GFlowNet with EM. Each seed has its own labels and first weights; the test sentences are the
same for all. SGLD samples a *cold* posterior, temperature 0.001, prior N(0, 9). Step size, prior and temperature
were chosen on 100 validation sentences and on labels that no seed draws. At temperature 1, with priors of scale 0.05
to 0.2, it learnt nothing from ten labels (explored by hand, not kept): the 24,576 parameters stay near their
prior, because ten labels say little about them.

Impossible sentences (`lmppl.embedded.subjectivity.strange`, frozen before any method ran) use the words of the corpus:
*three kinds* where the corpus has at most two, *word order* shuffled, *idle words* as cues. They have no true label, so
the only question is whether they are distinguished from test sentences. *-log p(x)* is that of the language model for
the sentence without a prompt.

"""


def main() -> None:
    studies = uncertainty.STUDIES
    parser = runner.options(__doc__, studies, seeds=5, jobs=1, runs="out/uncertainty", out="docs/uncertainty.md")
    a = parser.parse_args()
    runner.run("benchmarks.uncertainty", PREAMBLE, a, runner.chosen(parser, a, studies))


if __name__ == "__main__":
    main()
