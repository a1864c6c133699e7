"""Methods that need scores from a network, written so that several such methods can be scored together.

Such a method is a generator: it yields a `Request` and receives the scores. Called normally, it behaves like any other
method and returns what the generator returns. `asking` includes it in a joint computation.
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
"""A generator that yields requests, receives their scores, and returns a T."""
_made: dict[Callable[..., Any], Callable[..., Asking[Any]]] = {}


def asks(method: Callable[Concatenate[S, P], Asking[T]]) -> Callable[Concatenate[S, P], T]:
    """Makes a normal method of a generator method; it scores its requests alone.

    If a subclass overrides it, or a wrapper replaces it, the override is called, whatever it does.
    """

    @wraps(method)
    def alone(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        return together([method(self, *args, **kwargs)])[0]

    _made[alone] = method
    return alone


def asks_others(method: Any) -> bool:
    """Returns whether a bound method was made by `asks` and is not wrapped by anything else."""
    return getattr(method, "__func__", None) in _made


def asking(method: Callable[..., T], *args: Any, **kwargs: Any) -> Asking[T]:
    """Calls a bound method inside a joint computation; a method not made by `asks` is called normally."""
    if not asks_others(method):
        return method(*args, **kwargs)
    bound: Any = method
    result: T = yield from _made[bound.__func__](bound.__self__, *args, **kwargs)
    return result


def together(calls: Sequence[Asking[T]]) -> list[T]:
    """Returns the result of each of several calls; requests to the same view are scored together."""
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
