import pyro
import torch
from peft import LoraConfig

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import GFlowNet, Importance

lm = LanguageModel.embedded("stories")  # or LanguageModel.from_pretrained("gpt2")
q = lm.with_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def model(x, y):  # a middle follows the beginning; the ending, observed, follows both
    with pyro.plate("stories", len(x)):
        z = pyro.sample("z", Completion(lm, x, max_tokens=7, stop="."))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=y.shape[-1], stop=None), obs=y)


def guide(x, y):  # the same language model with an adapter, which gets to read the ending first
    with pyro.plate("stories", len(x)):
        pyro.sample("z", Completion(q, q.fill("Ending:{y}\nBeginning:{x}\nMiddle:", x=x, y=y), max_tokens=7, stop="."))


x, y = lm.encode(["Tom went to the kitchen."]), lm.encode([" He sliced it."])
prior = Importance(model, num_particles=512).run(x, y)
gflownet = GFlowNet(model, guide, optimizer=torch.optim.AdamW(q.trainable_parameters(), lr=3e-3))
gflownet.fit([(x, y)], steps=150)
amortised = gflownet.run(x, y, num_particles=512)
for name, posterior in {"prior proposals": prior, "trained guide": amortised}.items():
    print(f"{name}: log evidence {posterior.log_evidence.item():.2f}, ESS {posterior.ess.item():.0f} of 512")
    print(*(f"  {p:.3f} {text}" for text, p in posterior.table("z", 0)[:5]), sep="\n")
