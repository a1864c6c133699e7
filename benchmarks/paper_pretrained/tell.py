"""Draws stories from a language model for the study of infilling.

python -m benchmarks.paper_pretrained.tell --lm "$(python -m lmppl.pretrained smollm2)"    # stories.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from lmppl import LanguageModel, files
from lmppl.embedded import Story

from . import infilling
from .infilling import HELD_OUT, STORIES, TEST, TRAIN


@torch.no_grad()
def tell(lm: LanguageModel, count: int, seed: int) -> list[Story]:
    """Distinct stories drawn from the model, without those whose parts or whole encode to other tokens than drawn."""
    torch.manual_seed(seed)
    task, told = infilling.Told(lm), dict[str, Story]()
    while len(told) < count:
        text = lead = lm.encode([infilling.LEAD] * 16)
        found: list[Tensor] = []
        for _ in range(3):
            found.append(task.sentence(text).sample())
            text = lm.join(text, found[-1])
        drawn = lm.join(lead, found[0]), *found[1:]
        for ids in zip(*drawn, strict=True):
            parts, own = [lm.decode(each) for each in ids], [each[each >= 0].tolist() for each in ids]
            whole = lm.encode("".join(parts)).tolist()
            if [lm.encode(part).tolist() for part in parts] == own and whole == sum(own, []):
                told["".join(parts)] = Story(*parts)
    return [*told.values()][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=STORIES)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    told = tell(LanguageModel.from_pretrained(a.lm), TRAIN + HELD_OUT + TEST, a.seed)
    files.write(a.out, "".join(json.dumps(s._asdict(), ensure_ascii=False) + "\n" for s in told).encode())


if __name__ == "__main__":
    main()
