# %% [markdown]
# # From one core to eight GPUs, and a vLLM server
#
# **What we want to know.** A program runs on one core. What has to change so that it runs on eight GPUs, and how do
# we know that the answer stays the same? And can an inference server write the texts, while we learn from them?
#
# This page was executed on processor cores, without a GPU and without vLLM. What needs them is marked **not run
# here**. Two processes and a stand-in for the server did run.

# %%
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from peft import LoraConfig

import lmppl
from lmppl import LanguageModel
from lmppl.distributions import Completion
from lmppl.inference import Enumeration, GFlowNet, Mixture, OnPolicy, Prior, Served, VarGrad

torch.set_num_threads(1)
pyro.set_rng_seed(0)
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})
examples = Path(lmppl.__file__).parents[1] / "examples"  # of a checkout

# %% [markdown]
# ## One script for any number of processes
#
# `torchrun` starts a script several times. Every process is given the same batches, takes its part of the
# observations and ends with the same parameters. This is the whole script:

# %%
script = examples / "several_processes.py"
print(script.read_text())

# %% [markdown]
# Compared with a script for one process it has three things more:
#
# - the device of its own, `cuda:LOCAL_RANK`;
# - `world()`, which says which process this is and how many there are, so that only the first one prints;
# - `Sharded(algorithm)`, where the posterior of *all* observations is wanted on every process.
#
# `fit` needs no change. We start it on one process and on two.


# %%
def launched(processes, *command):
    """What the command prints when torchrun starts it on so many processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    found = subprocess.run([*torchrun, *map(str, command)], capture_output=True, text=True, env=os.environ)
    assert found.returncode == 0, found.stderr
    return found.stdout


printed = {n: launched(n, script) for n in (1, 2)}
print(*printed.values(), sep="")

# %% [markdown]
# ## Why the figures are the same
#
# A loss is a mean over the N observations of a batch. Process r has $n_r$ of them, weighs the mean of its own by
# $n_r / N$, and gradients are summed over processes. N need not be a multiple of the number of processes: here three
# observations are shared by two.
#
# Random numbers are drawn for the whole batch on every process, and each keeps those of its own observations. So the
# texts that are drawn do not depend on the number of processes either. A learning curve shows it best. `lmppl train`
# is a script like any other:

# %%
folder = Path(tempfile.mkdtemp())
curves = {}
for n in (1, 2):
    launched(n, "-m", "lmppl", "train", "infilling", "--steps", "6", "--out", folder / str(n))
    lines = (folder / str(n) / "run.jsonl").read_text().splitlines()
    curves[n] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
difference = max(abs(a - b) / a for a, b in zip(*curves.values(), strict=True))
print(f"largest relative difference of the loss in {len(curves[1])} steps: {difference:.1e}")

# %%
fig, ax = plt.subplots(figsize=(5, 2.6))
ax.plot(curves[1], label="one process", linewidth=4, color="#cccccc")
ax.plot(curves[2], label="two processes", marker="o", markersize=4, linewidth=0, color="#4477aa")
ax.set(xlabel="step", ylabel="loss, nats²", ylim=(0, None))
ax.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
plt.show()

# %% [markdown]
# Two things follow from this rule. The first axis of every argument is that of the observations, in a plate around
# all sites; what all observations share, a program closes over. And the network must not be wrapped in
# `DistributedDataParallel`, since trainers sum gradients themselves.
#
# ## Eight GPUs, several nodes
#
# **Not run here.** The same script, with another command:
#
# | | |
# |---|---|
# | one GPU | `python train.py`, with `LanguageModel.from_pretrained(name, device="cuda", dtype=torch.bfloat16)` |
# | eight GPUs | `torchrun --nproc_per_node 8 train.py` |
# | two nodes, each | `torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py` |
# | a model of the package | `torchrun --nproc_per_node 8 -m lmppl train infilling --device cuda --out out/train` |
#
# `accelerate launch` starts scripts too. Its settings for one machine with eight GPUs are in the repository:

# %%
print((examples / "accelerate" / "one_node.yaml").read_text())

# %% [markdown]
# On a processor `accelerate launch --cpu --num_processes 2` starts *one* process and says nothing. A script that
# counts on eight should ask: `assert world().size == 8`.
#
# **Not run here:** a network whose optimiser state does not fit on one GPU is sharded with FSDP2 *before* it is
# wrapped:
#
# ```python
# from torch.distributed.device_mesh import init_device_mesh
# from torch.distributed.fsdp import fully_shard
#
# rank, size = world()
# network = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
# fully_shard(network, mesh=init_device_mesh("cuda", (size,)), reshard_after_forward=False)
# lm = LanguageModel(network, tokenizer)
# ```
#
# This saves the memory of gradients and optimiser. While a step lasts the weights are whole on every GPU, so a
# network whose weights alone exceed a GPU cannot be trained here ([Scale](../scale.md) says why).
#
# ## Texts from a server
#
# Training compares values of $u = \log p(z, y) - \log q(z)$, and it may do so on any text $z$, wherever it comes
# from. So an inference server may write the texts while the learner scores them. Its weights may lag behind: that
# costs coverage, not correctness. `Served` asks a server that speaks OpenAI's completions protocol, as vLLM does.
#
# The task: a sum was worked out and its answer is known; what was the working?

# %%
lm = LanguageModel.embedded("arithmetic")
q = lm.with_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def model(x, y):
    with pyro.plate("sums", len(x)):
        z = pyro.sample("z", Completion(lm, x, max_tokens=5, stop="."))
        pyro.sample("y", Completion(lm, lm.join(x, z, " The answer is"), max_tokens=1, stop=None), obs=y)


def guide(x, y):
    with pyro.plate("sums", len(x)):
        pyro.sample("z", Completion(q, q.fill(" The answer is{y}.{x}", x=x, y=y), max_tokens=5, stop="."))


x = lm.encode(["Question: 9 - 3 = ? Answer:", "Question: 7 + 2 = ? Answer:", "Question: 4 + 8 = ? Answer:"])
y = lm.encode([" 9", " 5", " 12"])
exact = Enumeration(model, mass=0.999).run(x, y)

# %% [markdown]
# The stand-in has a network of its own and knows two requests: "complete this prompt n times" and "load this
# adapter". It samples token by token with transformers alone.


# %%
class StandIn:
    """Answers like a vLLM server: what is asked, the adapter it has, and how often it was asked."""

    def __init__(self, directory):
        self.lm, self.requests, self.lock = LanguageModel.embedded("arithmetic"), 0, threading.Lock()
        self.load(directory)

    def load(self, directory):
        self.writer = self.lm.with_adapter(str(directory))

    @torch.no_grad()
    def complete(self, asked):
        generator = torch.Generator().manual_seed(asked["seed"])
        stops, ids = asked["stop_token_ids"], torch.tensor(asked["prompt"]).expand(asked["n"], -1)
        start = ids.shape[1]
        for t in range(asked["max_tokens"]):
            logits = self.writer(ids).logits[:, -1] / asked["temperature"]
            if t < asked["min_tokens"]:
                logits[:, stops] = -torch.inf
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
        return {"choices": [self.choice(row, stops) for row in ids[:, start:].tolist()]}

    def choice(self, ids, stops):
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        if end is None:
            return {"token_ids": ids, "finish_reason": "length", "stop_reason": None}
        return {"token_ids": ids[: end + 1], "finish_reason": "stop", "stop_reason": ids[end]}

    def answer(self, path, asked):
        with self.lock:
            self.requests += 1
            if path.endswith("load_lora_adapter"):
                return self.load(asked["lora_path"])
            return self.complete(asked)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps(self.server.stand_in.answer(self.path, asked)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


adapter = folder / "adapter"
q.save_pretrained(adapter)
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.stand_in = StandIn(adapter)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"

# %% [markdown]
# **Not run here:** with vLLM the server would be started by
#
# ```shell
# VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve NAME --enable-lora --lora-modules guide=out/adapter
# ```
#
# and `url` would be `"http://localhost:8000/v1"`. The rest is as it is here.
#
# First a look at what the server writes. Its texts should follow the guide's own probabilities.

# %%
served = Served(q, url, "guide")
pyro.set_rng_seed(0)
texts = VarGrad(exploration=served, num_particles=2000).draw(model, guide, (x, y), {})["z"]  # (2000, 3, tokens)
for i in range(2):
    strings = [row[i] for row in lm.decode(texts)]
    most = max(set(strings), key=strings.count)
    prompt = q.fill(" The answer is{y}.{x}", x=x[i], y=y[i])
    probability = Completion(q, prompt, max_tokens=5, stop=".").log_prob(lm.encode(most)).exp().item()
    share = strings.count(most) / len(strings)
    error = (probability * (1 - probability) / len(strings)) ** 0.5
    print(f"{most!r}: share of the server's texts {share:.3f}, by the guide {probability:.3f} ± {error:.3f}")
    assert abs(share - probability) < 5 * error

# %% [markdown]
# Now training. Half of the texts are the server's, a quarter the learner's own, and a quarter the model's; every
# twenty steps `refresh` writes the adapter and tells the server to load it.

# %%
exploration = Mixture((served, 0.5), (OnPolicy(), 0.25), (Prior(), 0.25))
optimizer = torch.optim.AdamW(q.trainable_parameters(), lr=6e-3)
gflownet = GFlowNet(model, guide, optimizer=optimizer, exploration=exploration)
before = gflownet.run(x, y, num_particles=500)
gflownet.fit(
    [(x, y)],
    steps=80,
    progress=False,
    callback=lambda step, _: served.refresh(adapter) if step % 20 == 0 else None,
)
after = gflownet.run(x, y, num_particles=500)
server.shutdown()
print(f"requests: {server.stand_in.requests}")
for i in range(3):
    low, high = (bound[i] for bound in exact.log_evidence_bounds)
    print(f"{lm.decode(x[i])}{lm.decode(y[i])}: log evidence {after.log_evidence[i]:.3f}", end="; ")
    print(f"exactly {low:.3f} to {high:.3f}; ESS {before.ess[i]:.0f} -> {after.ess[i]:.0f} of 500")

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 2.6))
for i, ax in enumerate(axes):
    names = [s for s, _ in exact.table("z", i)[:4]]
    for j, (name, posterior) in enumerate({"exact": exact, "guide": after}.items()):
        p = dict(posterior.table("z", i))
        ax.barh(torch.arange(4) + 0.35 * j, [p.get(s, 0.0) for s in names], 0.35, label=name)
    ax.set_yticks(torch.arange(4) + 0.17, names)
    ax.invert_yaxis()
    ax.set(xlabel="posterior probability", title=f"{lm.decode(x[i])}{lm.decode(y[i])}")
    ax.title.set_fontsize(9)
axes[1].legend(frameon=False)
fig.tight_layout()
plt.show()

# %% [markdown]
# `Served` refuses what a server cannot know of: `allowed=`, `tools=` and stop strings. On several processes let the
# first one refresh. Posteriors (`run`) are always drawn by the learner.
#
# The claims of this page, as assertions.

# %%
figures = {n: re.findall(r"-?\d+\.\d+", out) for n, out in printed.items()}
assert figures[1] == figures[2] and printed[2].startswith("2 processes")
assert difference < 1e-3
low, high = exact.log_evidence_bounds
error = 1 / after.ess.sqrt()
assert bool((after.log_evidence > low - 5 * error).all() and (after.log_evidence < high + 5 * error).all())
assert bool((after.ess > 2 * before.ess).all())

# %% [markdown]
# ## What to read next
#
# - [Scale](../scale.md): the rules in full, what is tested and what is not.
# - [Training](../training.md): checkpoints, which may be resumed on another number of processes.
# - [Performance](../performance.md): what a step costs, and where the time goes.
# - [Pretrained models](../pretrained.md): larger language models.
