"""Subjectivity on the embedded sentences, or on sentences of one's own; its programs are `programs/subjectivity.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from ..embedded import Sentence
from ..inference import Enumeration
from ..language_model import LanguageModel
from .data_files import parsed, read_each
from .experiment import TEST_OBSERVATIONS, Experiment, Options, Recipe, Start, embedded_splits, split
from .programs.subjectivity import Subjectivity

PENALTY = 50.0  # nats, of the paper's released setting


def sentence(line: str) -> Sentence:
    """The sentence and its label in a line of JSON."""
    item = parsed(line)
    try:
        x, label = item["text"].strip(), item["label_text"].strip()
    except (KeyError, TypeError, AttributeError):
        x = label = ""
    if not x or not label:
        raise ValueError('is no object with the strings "text" and "label_text"')
    return Sentence(x, label, "")


def read_sentences(path: str | Path) -> list[Sentence]:
    """Sentences from a JSONL file, an object with "text" and "label_text" a line; errors as of `read_each`."""
    return read_each(path, sentence, "sentence")


def read_data(path: str | Path, count: int) -> tuple[list[Sentence], list[Sentence], list[Sentence]]:
    """Sentences to train on, to validate on and to test on.

    Of a directory: train.{count}.jsonl, or the first ``count`` of train.jsonl; others of train.jsonl, where there is
    one; test.jsonl.  A file is split.
    """
    path = Path(path)
    if not path.is_dir():
        return split(read_sentences(path))
    few, many = path / f"train.{count}.jsonl", path / "train.jsonl"
    pool = read_sentences(many) if many.is_file() else []
    train = read_sentences(few) if few.is_file() or not pool else pool[:count]
    seen = {s.text for s in train}
    held_out = [s for s in pool if s.text not in seen][:TEST_OBSERVATIONS]
    return train, held_out or train, read_sentences(path / "test.jsonl")


def experiment(
    lm: LanguageModel | None = None,
    data: str | Path | None = None,
    *,
    reads: str = "xy",
    count: int = 0,
    **options: Unpack[Options],
) -> Experiment:
    """The reason why a sentence is called objective or subjective.

    On the embedded LM, where the posterior is known, or on ``lm`` with the sentences of ``data``: a JSONL file, or a
    directory with train.10.jsonl and the like.  ``reads``: what the guide reads, "xy" or "x".  ``count``: so many
    labelled sentences to train on (0: all that the embedded LM has, 10 of a directory).

    :raises ValueError: for another language model without ``data``: the embedded sentences are in its vocabulary.
    """
    if count < 0:
        raise ValueError(f"count: must not be negative, got {count}")
    needs = "sentences of its own, a JSONL file or a directory of them"
    start = Start.of("subjectivity", "subjectivity", lm, data, Recipe(), needs, **options)
    given: dict[str, Any] = {"reads": reads, "penalty": PENALTY if start.paper else 0.0}
    if data is None:
        train, held_out, test = embedded_splits("subjectivity")
        train = train[: count or len(train)]
    else:
        train, held_out, test = read_data(data, count or 10)
        given["labels"] = sorted({s.label for s in (*train, *held_out, *test)})
    if lm is None:
        given |= {"allowed": "reasons", "max_tokens": 2}
    task = Subjectivity(start.lm, start.guide_lm, **given)
    return start.experiment(
        task,
        (train, held_out, test[:TEST_OBSERVATIONS]),
        lambda s: f"{s.text}    ({s.label})",
        exact=Enumeration(task.model) if lm is None else None,
        target="p(z|x, y), less 50 nats where another label is likelier: the paper's setting"
        if task.penalty
        else "the posterior",
    )
