"""The quickstart on several processes: torchrun --nproc_per_node 8 examples/several_processes.py"""

import os

import pyro
import torch
from peft import LoraConfig

from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import GFlowNet, Sharded
from lmppl.inference.processes.distributed import world

device = "cpu"
if torch.cuda.is_available():
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    torch.cuda.set_device(device)
rank, size = world()
torch.manual_seed(0)

lm = LanguageModel.embedded("stories", device=device)
q = lm.with_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def model(x, y):
    with pyro.plate("stories", len(x)):
        z = pyro.sample("z", Completion(lm, x, max_tokens=7, stop="."))
        pyro.sample("y", Completion(lm, lm.join(x, z), max_tokens=y.shape[-1], stop=None), obs=y)


def guide(x, y):
    with pyro.plate("stories", len(x)):
        pyro.sample("z", Completion(q, q.fill("Ending:{y}\nBeginning:{x}\nMiddle:", x=x, y=y), max_tokens=7, stop="."))


# All observations, on every process: each takes its part.
x = lm.encode(["Tom went to the kitchen.", "Mia went to the school.", "Ben went to the market."])
y = lm.encode([" He sliced it.", " She buttoned it.", " He stamped it."])
gflownet = GFlowNet(model, guide, optimizer=torch.optim.AdamW(q.trainable_parameters(), lr=3e-3))
history = gflownet.fit([(x, y)], steps=5)
posterior = Sharded(gflownet).run(x, y, num_particles=64)  # of all observations, on every process
if rank == 0:
    log_evidence = " ".join(f"{z:.2f}" for z in posterior.log_evidence)
    print(f"{size} processes; loss {history[-1]['loss']:.3f}; log evidence {log_evidence}")
