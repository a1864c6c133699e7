r"""TRL's side of the study `grpo`, run by the interpreter of its own environment, which has no lmppl.

    .venv-trl/bin/python benchmarks/paper_pretrained/grpo_worker.py FOLDER

task.json in the folder has the training task and its data.  The worker writes the adapter, in PEFT's layout, and
figures.json into the folder.  The reward of a text z after the prompt x, and of its label y if the task has labels, is

.. math:: \log p(z \mid x) / T + \log p(y \mid x, z)

under the network without its adapter.  *Matched* subtracts log q(z | x) of the network that is trained; the mean of
this reward is largest if q is proportional to the exponential of the first reward.

Barred tokens get a bias in the output layer.  So sampling, training and reward all share their mass in the same way.  A
text ends at its stop, which is TRL's eos here, or at the limit.  There lmppl's stop is certain and so has no cost.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

BARRED = -1e4  # a logit with probability 0; it is finite, so that entropies are finite
Ids = list[int]


@dataclass(frozen=True)
class Target:
    """The parameters of log p(z | x) / T + log p(y | x, z), as token ids."""

    stop: int
    limit: int  # tokens before the stop, at most
    least: int = 0  # tokens before the stop, at least
    temperature: float = 1.0
    then: tuple[int, ...] = ()  # between z and y
    labels: tuple[int, ...] = ()  # the possible labels, one token each; empty: no y

    def ended(self, z: Ids) -> Ids:
        """A text with its stop."""
        return z if z[-1:] == [self.stop] else [*z, self.stop]


def bar(model: Any, barred: Ids) -> None:
    """Give these tokens no probability in every pass of the model."""
    layer = model.get_output_embeddings()
    bias = torch.zeros(len(layer.weight), dtype=layer.weight.dtype, device=layer.weight.device)
    bias[barred] = BARRED
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)


@torch.no_grad()
def read(model: Any, target: Target, x: Sequence[Ids], z: Sequence[Ids], then: Ids) -> tuple[Tensor, Tensor]:
    """log p(z | x), (R,), and the logits after x, z and ``then``, (R, V), in one pass; each z with its stop."""
    rows = [[*a, *b, *then] for a, b in zip(x, z, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    logits = model(input_ids=ids, attention_mask=mask).logits  # (R, L, V)
    log_p = []
    for i, (a, b) in enumerate(zip(x, z, strict=True)):
        chosen = torch.tensor(b[: target.limit], device=model.device)  # a stop at the limit is certain
        here = logits[i, len(a) - 1 : len(a) - 1 + len(chosen)].clone()
        here[: target.least, target.stop] = -torch.inf
        log_p.append(here.log_softmax(-1).gather(-1, chosen[:, None]).sum())
    return torch.stack(log_p), torch.stack([logits[i, len(row) - 1] for i, row in enumerate(rows)])


def log_target(model: Any, target: Target, x: Sequence[Ids], z: Sequence[Ids], y: Sequence[int] | None) -> Tensor:
    """log p(z | x) / T + log p(y | x, z), (R,); y is an index into the target's labels."""
    log_p, after = read(model, target, x, z, [*target.then])
    log_p = log_p / target.temperature
    if y is None:
        return log_p
    log_labels = after[:, list(target.labels)].log_softmax(-1)
    return log_p + log_labels.gather(-1, torch.tensor(y, device=log_p.device)[:, None])[:, 0]


def train(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train an adapter by TRL's GRPO; the cost, and the mean reward of each step."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    set_seed(task["seed"])
    tokenizer: Any = AutoTokenizer.from_pretrained(task["lm"])
    model: Any = AutoModelForCausalLM.from_pretrained(task["lm"])
    target, matched = Target(**task["target"]), task["matched"]
    bar(model, task["barred"])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(target.stop)
    model.generation_config.eos_token_id = target.stop

    def reward(prompts: list[str], completion_ids: list[Ids], **given: Any) -> list[float]:
        x, z = tokenizer(prompts)["input_ids"], [target.ended(ids) for ids in completion_ids]
        with trainer.model.disable_adapter():
            found = log_target(trainer.model, target, x, z, given.get("y"))
        if matched:
            found = found - read(trainer.model, target, x, z, [])[0]
        return found.tolist()

    config = GRPOConfig(
        output_dir=str(folder / "trl"), seed=task["seed"], max_steps=task["steps"],
        per_device_train_batch_size=task["observations"] * task["particles"], num_generations=task["particles"],
        max_completion_length=target.limit, generation_kwargs={"min_new_tokens": target.least},
        learning_rate=task["learning_rate"], lr_scheduler_type="constant",
        scale_rewards="none" if matched else "group",
        bf16=False, use_cpu=task["device"] == "cpu", gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({key: task[key] for key in ("prompt", "y") if task[key] is not None})
    trainer = GRPOTrainer(
        model, reward, args=config, train_dataset=data, processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **task["adapter"]),
    )  # fmt: skip
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    trainer.model.save_pretrained(str(folder / "adapter"))
    return {
        "seconds": seconds,
        "tokens": trainer.state.num_input_tokens_seen,  # of prompts and texts, once each
        "rewards": [entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
    }


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    figures = train(json.loads((folder / "task.json").read_text()), folder)
    (folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
