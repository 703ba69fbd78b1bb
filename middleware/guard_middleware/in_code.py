"""guarded(): a guard around backends that are called in this process, with no HTTP in between."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from guard_middleware.formats.openai_chat import OpenAIChat
from guard_middleware.formats.openai_text import OpenAIText
from guard_middleware.guards import Guard, open_guard
from guard_middleware.in_code_backends import Arguments, Backend, own_call
from guard_middleware.in_code_calls import Judges
from guard_middleware.in_code_shapes import Function, Method, Pipeline, Shape
from guard_middleware.loop_thread import LOOP
from guard_middleware.metrics import Metrics, shared
from guard_middleware.settings import Settings, from_environment


def guarded(
    backend: Any,
    guard: str | Guard | None = None,
    *,
    settings: Settings | None = None,
    metrics: Metrics | None = None,
    **given: Any,
) -> Any:
    """`backend` with a guard around it, to be called as before.

    Takes a transformers pipeline for text generation, a `llama_cpp.Llama`, a client of `openai`
    (chat and text completions), or a function of a text or of chat messages whose answer is a text,
    or a generator of texts; either of them async. Of objects, only the methods that are screened
    are there. What is blocked is answered with the refusal in the shape that the backend answers
    with; `refuse_with="error"` raises Blocked instead.

    Guard, settings and the other keywords are those of GuardMiddleware, but that the request is
    always judged before the call. Raises TypeError for backends that are not known, and
    SettingsError. Calls raise TypeError and ValueError for what cannot be screened.
    """
    if isinstance(guard, str):
        given["guard"] = guard
        guard = None
    chosen = settings or from_environment(**given)
    judges = Judges(guard or open_guard(chosen), chosen, metrics or shared())
    if guard is None:  # it is ours, and goes with the last call
        weakref.finalize(judges, _let_go, judges.guard)
    return _wrapped(backend, judges)


class _Screened:
    """Stands for an object; only its screened methods are there."""

    def __init__(self, kind: str, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._kind = kind
        self._own_call = methods.get("__call__")
        for path, method in methods.items():
            *folders, name = path.split(".")
            place: Any = self
            for folder in folders:
                place = place.__dict__.setdefault(folder, SimpleNamespace())
            place.__dict__[name] = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._own_call is None:
            raise TypeError(f"a {self._kind} is not called")
        return self._own_call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self._kind}.{name} is not screened, and is not let through")


def _wrapped(backend: Any, judges: Judges) -> Any:
    if known := _known(type(backend)):
        kind, awaited, methods = known
        return _Screened(
            kind,
            {
                path: Backend(_at(backend, path), shape, judges).screened(awaited)
                for path, shape in methods.items()
            },
        )
    if isinstance(backend, type) or not callable(backend):
        kind = type(backend).__name__
        raise TypeError(f"what is of type {kind} is neither a function nor a backend that is known")
    own = own_call(backend)
    streams = inspect.isgeneratorfunction(own) or inspect.isasyncgenfunction(own)
    shape = Function(Arguments(backend).first, streams)
    return Backend(backend, shape, judges).screened(inspect.iscoroutinefunction(own))


def _known(kind: type) -> tuple[str, bool, Mapping[str, Shape]] | None:
    """Name, whether its methods are awaited, and these. Raises TypeError for another class of a
    library that is known."""
    named = [(one.__module__.partition(".")[0], one.__name__) for one in kind.__mro__]
    for one in named:
        if one in _CLASSES:
            return one[1], *_CLASSES[one]
    if {root for root, _ in named} & {root for root, _ in _CLASSES}:
        raise TypeError(f"a {kind.__name__} of {kind.__module__} cannot be screened")
    return None


def _at(backend: Any, path: str) -> Any:
    return (
        backend.__call__
        if path == "__call__"
        else functools.reduce(getattr, path.split("."), backend)
    )


def _let_go(guard: Guard) -> None:
    if LOOP.begun:
        LOOP.submit(guard.close())


def _model(module: str, name: str) -> Callable[[Any], Any]:
    """Makes the library's own object; who is asked for one has loaded the library."""
    return lambda value: getattr(import_module(module), name).model_validate(value)


_LLAMA_CHAT, _LLAMA_TEXT = Method(OpenAIChat()), Method(OpenAIText())
_OPENAI: Mapping[str, Shape] = {
    "chat.completions.create": Method(
        OpenAIChat(),
        _model("openai.types.chat", "ChatCompletion"),
        _model("openai.types.chat", "ChatCompletionChunk"),
    ),
    "completions.create": Method(
        OpenAIText(),
        _model("openai.types", "Completion"),
        _model("openai.types", "Completion"),
    ),
}
# Library and class; whether its methods are awaited; the methods that are screened.
_CLASSES: Mapping[tuple[str, str], tuple[bool, Mapping[str, Shape]]] = {
    ("transformers", "TextGenerationPipeline"): (False, {"__call__": Pipeline()}),
    ("llama_cpp", "Llama"): (
        False,
        {
            "create_chat_completion": _LLAMA_CHAT,
            "create_completion": _LLAMA_TEXT,
            "__call__": _LLAMA_TEXT,
        },
    ),
    ("openai", "OpenAI"): (False, _OPENAI),
    ("openai", "AsyncOpenAI"): (True, _OPENAI),
}
