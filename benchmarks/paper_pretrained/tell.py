"""Stories that a language model tells, for the study of infilling.

python -m benchmarks.paper_pretrained.tell --lm "$(python -m lmppl.pretrained smollm2)"    # stories.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from lmppl import LanguageModel, files
from lmppl.embedded import Story

from . import infilling
from .infilling import HELD_OUT, STORIES, TEST, TRAIN


@torch.no_grad()
def tell(lm: LanguageModel, count: int, seed: int) -> list[Story]:
    """Distinct stories that the model draws; those whose spelling has other tokens are left out."""
    torch.manual_seed(seed)
    task, told = infilling.Told(lm), dict[str, Story]()
    while len(told) < count:
        text, found = lm.encode([infilling.LEAD] * 16), []
        for _ in range(3):
            found.append(task.sentence(text).sample())
            text = lm.join(text, found[-1])
        for x, z, y in zip(*map(lm.decode, found), strict=True):
            parts = infilling.LEAD + x, z, y
            if lm.join(*map(lm.encode, parts)).tolist() == lm.encode("".join(parts)).tolist():
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
