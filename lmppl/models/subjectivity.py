"""Subjectivity on the embedded sentences, or on the user's; the programs are in `programs/subjectivity.py`."""

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
        raise ValueError('is not an object with the strings "text" and "label_text"')
    return Sentence(x, label, "")


def read_sentences(path: str | Path) -> list[Sentence]:
    """Sentences from a JSONL file, an object with "text" and "label_text" in each line; errors as in `read_each`."""
    return read_each(path, sentence, "sentence")


def read_data(path: str | Path, count: int) -> tuple[list[Sentence], list[Sentence], list[Sentence]]:
    """Sentences for training, validation and test.

    From a directory: train.{count}.jsonl, or the first ``count`` of train.jsonl; others of train.jsonl, where there is
    one; test.jsonl.  A single file is split.
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

    It runs on the embedded LM, whose posterior is known, or on ``lm`` with the sentences of ``data``.

    :param lm: a language model; None: the embedded one.
    :param data: a JSONL file, or a directory with train.10.jsonl (or train.jsonl) and test.jsonl; None: the embedded
        sentences.
    :param reads: what the guide reads: "xy", sentence and label, or "x", the sentence.
    :param count: how many labelled sentences to train on; 0: all embedded ones, 10 of a directory.
    :param options: those of every experiment, see `experiment.Options`.
    :returns: an `Experiment`.
    :raises ValueError: for another language model without ``data``: the embedded sentences are written in the embedded
        LM's vocabulary.
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
