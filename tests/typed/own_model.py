"""A user's program: a model of texts, its guide, training, posteriors, tables and pictures."""

from typing import Any, assert_type

import pyro
import torch
from peft import LoraConfig
from torch import Tensor

import lmppl
from lmppl import LanguageModel, text
from lmppl.constraints import only
from lmppl.distributions import Completion
from lmppl.inference import (
    SMC,
    Comparison,
    Diagnosis,
    Enumerated,
    Enumeration,
    GFlowNet,
    Importance,
    MarkovChains,
    MetropolisHastings,
    Posterior,
    Prediction,
    Predictive,
    Sequential,
    compare,
    diagnose,
    plot_ancestry,
)

lm = LanguageModel.embedded("stories")
q = lm.with_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
assert_type(lm, LanguageModel)
assert_type(q, LanguageModel)
assert_type(lmppl.__version__, str)


def model(x: Tensor, y: Tensor) -> None:
    with pyro.plate("stories", len(x)):
        z = pyro.sample("z", Completion(lm, x, max_tokens=7, stop="."))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=y.shape[-1], stop=None), obs=y)


def guide(x: Tensor, y: Tensor) -> None:
    with pyro.plate("stories", len(x)):
        prompt = q.fill("Ending:{y}\nBeginning:{x}\nMiddle:", x=x, y=y)
        pyro.sample("z", Completion(q, prompt, max_tokens=7, stop=".", allowed=only(lm, [" He", "."])))


x, y = lm.encode(["Tom went to the kitchen."]), lm.encode([" He sliced it."])
assert_type(x, Tensor)
string: str = lm.decode(x[0])
assert_type(text.length(x), Tensor)

importance = Importance(model, guide, num_particles=512)
prior = importance.run(x, y)
assert_type(prior, Posterior)
assert_type(SMC(model, num_particles=8).run(x, y), Sequential)
assert_type(Enumeration(model).run(x, y), Enumerated)
assert_type(MetropolisHastings(model, num_chains=2).run(x, y), MarkovChains)
assert_type(importance.on(model), Importance)
assert_type(importance.sized(8), Importance)

gflownet = GFlowNet(model, guide, optimizer=torch.optim.AdamW(q.trainable_parameters(), lr=3e-3))
gflownet.fit([(x, y)], steps=150)
assert_type(gflownet.step(x, y), dict[str, float])
assert_type(gflownet.run(x, y, num_particles=512), Posterior)

assert_type(prior.samples["z"], Tensor)
assert_type(prior.ess, Tensor)
assert_type(prior.log_evidence, Tensor)
assert_type(prior.probabilities, Tensor)
assert_type(prior.table("z", 0), list[tuple[Any, float]])
assert_type(prior.table(["z", "z"], (0,)), list[tuple[tuple[Any, ...], float]])
assert_type(prior.resample(10), Posterior)
assert_type(prior.standard_error(prior.samples["z"][:, 0, 0] > 3, 0), Tensor)
assert_type(prior.summary(0), dict[str, float])
assert_type(prior.predictive(model, x, y), Predictive)
assert_type(prior.predict(model, [" He ate it."], x, None), Prediction)
assert_type(Posterior.load("posterior"), Posterior)
assert_type(Enumerated.load("posterior"), Enumerated)
prior.to_pandas().groupby("z").weight.sum()
prior.plot("z", 0).set_title("middles")
grown = SMC(model, num_particles=8).run(x, y)
plot_ancestry(grown.ancestry, index=0).set_title("descent")
assert_type(grown.suspect, Tensor)
assert_type(compare(model, {"prior": importance}, x, y), Comparison)
assert_type(diagnose(importance, x, y), Diagnosis)
lmppl.check(model, guide, x, y)
for string, probability in prior.table("z", 0):
    print(f"{probability:.3f} {string}")
