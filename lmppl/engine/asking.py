"""Methods that ask a network on their way, written so that several of them can be asked together.

Such a method is a generator: it yields a `Request` and is sent its answer.  Called by its name it is a method like any
other, which returns what the generator returns; `asking` takes it up where others are asked at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor

from .scoring import Request, score_together

S = TypeVar("S")
T = TypeVar("T")
P = ParamSpec("P")
Asking = Generator[Request, Tensor, T]
"""What yields requests, is sent their answers, and returns a T."""
_made: dict[Callable[..., Any], Callable[..., Asking[Any]]] = {}


def asks(method: Callable[Concatenate[S, P], Asking[T]]) -> Callable[Concatenate[S, P], T]:
    """The method that asks alone; one that overrides or wraps it is asked for itself, whatever that one does."""

    @wraps(method)
    def alone(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        return together([method(self, *args, **kwargs)])[0]

    _made[alone] = method
    return alone


def asks_others(method: Any) -> bool:
    """Whether a bound method is one that `asks` made, and no other around it."""
    return getattr(method, "__func__", None) in _made


def asking(method: Callable[..., T], *args: Any, **kwargs: Any) -> Asking[T]:
    """A call of a bound method, which asks nothing of anybody if it is none of those that `asks` made."""
    if not asks_others(method):
        return method(*args, **kwargs)
    bound: Any = method
    result: T = yield from _made[bound.__func__](bound.__self__, *args, **kwargs)
    return result


def together(calls: Sequence[Asking[T]]) -> list[T]:
    """What each of several calls returns; what they ask one view at a time is scored together."""
    results: dict[int, T] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(calls)))
    while answers:
        views: dict[int, list[tuple[int, Request]]] = {}
        for i, answer in answers.items():
            try:
                request = calls[i].send(answer)
            except StopIteration as end:
                results[i] = end.value
            else:
                views.setdefault(id(request.lm), []).append((i, request))
        answers = {}
        for asked in views.values():
            order, requests = zip(*asked, strict=True)
            answers |= zip(order, score_together(requests), strict=True)
    return [results[i] for i in range(len(calls))]
