"""Does a model know when it does not know: docs/uncertainty.md.

    python -m benchmarks.uncertainty --seeds 5

Every unit of work (a cell and a seed) is one JSON file under --runs; the same command goes on where an interrupted one
was.
"""

from __future__ import annotations

from benchmarks import uncertainty
from benchmarks.paper import runner

PREAMBLE = """# Uncertainty: does it know when it does not know?

A model answers by way of a chain of thought. Does its uncertainty tell where the answer is wrong? And does it help to
split it into what chance, what chains and what parameters leave open? Figures of five seeds, on the embedded
sentences, where every sum is exact:

- **It finds errors, if it is averaged over chains.** With 10 labels AUROC of its own errors is 0.79 by all chains of
  one adapter and 0.81 of five, 0.71 by self-consistency votes, 0.69 by one chain, 0.65 by the direct answer of one
  adapter and 0.70 of five. The surer half of the sentences is then 95.5% right with five adapters, 89.2 by votes,
  79.1 directly. Votes of 32 chains are unanimous on most sentences, wrong ones among them. Chains of p(z|x) do better
  than the guide's (32 of either: 0.77 and 0.69), and five samples of SGLD, one run of 200 steps, about as well as one
  EM run (0.78, with the best log score of all, -0.50). Seeds differ much: of eight such comparisons two hold at 95%,
  both at 50 labels, and with fifteen claims that is little.
- **It is overconfident.** ECE is 0.14 with 10 labels where chance would make 0.03, and 0.27 for the direct answer.
- **The parts do not tell different things apart.** It was expected that parameter information finds what was not
  learnt. It does (kinds without a label 0.81), but so do expected entropy and chain information (0.82, 0.83), and
  errors are found by each part as by their sum (0.78 to 0.81). Five EM runs disagree little, by 0.03 nats; whether
  because each fits its ten labels to the end was not tested.
- **It does not know nonsense.** Shuffled sentences and sentences of three kinds are hardly told from those of the
  test by any part of five adapters' entropy (0.53 to 0.65; three kinds by samples of SGLD 0.74), idle words by
  expected entropy (0.93). log p(x) of the language model finds all three (0.96 to 1.00) and no errors (0.55).
- **From few chains the plug-in misleads**: from two chains a member parameter information comes out at 0.070 nats for
  0.030, chain information at 0.048 for 0.100. The jackknife says 0.034 and 0.096.

Written by `make uncertainty` (`python -m benchmarks.uncertainty`): {seeds} seeds, {hours:.1f} core-hours.

## What is computed

An answer y is reached from x by a chain z, under parameters theta that training has not settled: J adapters with
weights pi. The model averages over both,

    p(y|x) = sum_j pi_j sum_z p_j(z|x) p_j(y|x, z)

and its entropy is the sum of three parts, each in nats and none below zero:

    entropy                H[p(y|x)]
      = expected entropy         mean over theta, z of H[p(y|x, z, theta)]   what chain and parameters leave open
      + chain information        mean over theta of I(y; z | x, theta)       what a chain would tell
      + parameter information    I(y; theta | x)                             what the parameters, so labels, would tell

```python
members = [task.predict(x) for task in tasks]  # a `Prediction` an adapter: here the sum over all 156 chains
found = Ensemble.of(members)  # is a `Prediction` too: .probabilities, .vote
found.split().parameter_information  # (sentences,)

drawn = Ensemble.of([task.predict(x, num_particles=8) for task in tasks])
drawn.jackknife().parameter_information  # from 8 chains an adapter
```

Members may be any `Prediction` of the same candidates: `posterior.predict(model, candidates, x)` of any Pyro program,
EM runs from several seeds, prompts, or samples of one adapter's parameters by the optimiser `SGLD`. Scores of
forecasts are in `lmppl.models.forecasts`.

`lmppl compare uncertainty` trains three adapters on ten labels (`--set count=50 --set members=5`: five on fifty), says
what the entropy of their answers is made of where they are right and where they are wrong, and draws it sentence by
sentence (`uncertainty.png`), beside what `lmppl compare subjectivity` shows.

**Few chains mislead.** Entropy is concave, so that of an average of S draws is too small, by (1 / 2S) sum_c Var_z
p(c|z) / p(c) to first order. With it chain information is too small (from one chain it is zero), and parameter
information is *too large*: members that drew different chains look like members that disagree. From two chains it is
twice what it is, in the last table below. The jackknife, which leaves out each chain in turn, takes the first order
off: what is left is O(1 / S^2), tested by summing over every sample there is. It does not make one sentence's
estimate less noisy.

## On SmolLM2

SmolLM2-135M-Instruct with prompts and sentences of [results-pretrained.md](results-pretrained.md), 300 of them, each
answered by ten chains; AUROC of an answer's own errors by its entropy, with 95% intervals over sentences:

- untrained 0.72 (0.66 to 0.78) by chains, 0.73 (0.66 to 0.79) by the direct answer;
- at 10 labels 0.75 (0.67 to 0.82) by chains of GFlowNet + EM, which are right on 84.7%, and 0.81 (0.76 to 0.86) by the
  direct answers of supervised adapters, right on 76.0%.

What came out on the embedded sentences is not seen here: with labels chains are right more often, and know no better
when they are wrong. Each answer is held to its own errors, of which the chains' are fewer; and ten chains are few.
`python -m benchmarks.paper_pretrained --only uncertainty` has the table.

## What is compared

The sentences, chains and labels of [subjectivity](subjectivity.md): p(y|x, z) follows one of 156 chains, so every sum
is exact. A member is an adapter that exact EM trained on 10 or 50 labelled sentences, five of them from other first
weights; *direct* is an adapter trained on log p(y|x) with the prompt "{{x}} is", no chain; *the guide* is q(z|x) of a
GFlowNet, with EM. A seed draws its labels and first weights; the test sentences are the same for all. SGLD is a chain
of a *cold* posterior, temperature 0.001, prior N(0, 9): step size, prior and temperature were chosen on 100
validation sentences and on labels that no seed draws. At temperature 1, with priors of scale 0.05 to 0.2, it learnt
nothing from ten labels (explored by hand, not kept): 24,576 parameters of which they say little stay near their
prior.

Impossible sentences (`lmppl.embedded.subjectivity.strange`, frozen before any method ran) are told in the corpus's
words: *three kinds* where it has two at most, *word order* shuffled, *idle words* as cues. They have no true label,
so that the question is only whether they are told from test sentences. *-log p(x)* is the language model's own, of
the sentence after nothing.

"""


def main() -> None:
    studies = uncertainty.STUDIES
    parser = runner.options(__doc__, studies, seeds=5, jobs=1, runs="out/uncertainty", out="docs/uncertainty.md")
    a = parser.parse_args()
    runner.run("benchmarks.uncertainty", PREAMBLE, a, runner.chosen(parser, a, studies))


if __name__ == "__main__":
    main()
