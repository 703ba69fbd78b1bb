"""Calls a backend in process as its caller would, in the caller's own thread or loop, with a guard
before it and behind it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from guard_middleware.in_code_calls import Call, Judges
from guard_middleware.in_code_shadow import ShadowCall
from guard_middleware.in_code_shapes import Given, Shape, read_json
from guard_middleware.loop_thread import LOOP
from guard_middleware.strict_json import dump, parse

# Objects of the caller's program, through which no text reaches a model.
_NO_TEXT = frozenset(
    {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "generation_config"}
    | {"tokenizer", "grammar", "logit_bias"}
)
# What would take the prompt or the reply past the guard.
_ROUND = frozenset({"extra_body", "streamer"})


class Arguments:
    """Reads a call's arguments by name, and calls with what was judged."""

    def __init__(self, target: Callable[..., Any]) -> None:
        """Raises TypeError for what does not tell its parameters, or has none."""
        try:
            self._signature = inspect.signature(target)
        except (TypeError, ValueError):
            raise TypeError("what does not tell its parameters cannot be screened") from None
        parameters = self._signature.parameters.values()
        self.first = next((one.name for one in parameters), "")
        if not self.first or self._signature.parameters[self.first].kind in _GATHERED:
            raise TypeError("what has no first parameter with a name cannot be screened")
        self._by_place = [one.name for one in parameters if one.kind is _BY_PLACE]

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Given, dict[str, Any]]:
        """The arguments that are judged, as plain values of their own, and those that no text goes
        through. Raises TypeError, ValueError."""
        found: dict[str, Any] = {}
        for name, value in self._signature.bind(*args, **kwargs).arguments.items():
            parameter = self._signature.parameters[name]
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                found |= value
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                raise TypeError("arguments without a name cannot be screened")
            elif value is not parameter.default:
                found[name] = value
        if past := _ROUND & found.keys():
            raise TypeError(f"{min(past)} would go past the guard, and is not let through")
        held = {
            name: found.pop(name) for name in _NO_TEXT & found.keys() if not _is_plain(found[name])
        }
        return parse(dump(read_json(found, "the arguments"))), held  # type: ignore[return-value]

    def call(self, target: Callable[..., Any], given: Given, held: Mapping[str, Any]) -> Any:
        """Call with these arguments."""
        named = {**given, **held}
        placed = [named.pop(name) for name in self._by_place if name in named]
        return target(*placed, **named)


def _is_plain(value: object) -> bool:
    try:
        read_json(value, "")
    except TypeError:
        return False
    return True


class Backend:
    """A callable with a guard around it.

    A whole reply is judged before it is returned. Of a stream, each step takes one chunk from the
    backend and gives those that verdicts cover by then; at its end it waits for the last ones.
    """

    def __init__(self, target: Callable[..., Any], shape: Shape, judges: Judges) -> None:
        self._target = target
        self._shape = shape
        self._judges = judges
        self._arguments = Arguments(target)

    def screened(self, awaited: bool) -> Callable[..., Any]:
        """The function to call in place of the target; `awaited` where that is awaited."""
        if awaited:

            async def awaits(*args: Any, **kwargs: Any) -> Any:
                return await self._await(*args, **kwargs)

            return self._named(awaits)

        def calls(*args: Any, **kwargs: Any) -> Any:
            return self._call(*args, **kwargs)

        return self._named(calls)

    def _named(self, call: Callable[..., Any]) -> Callable[..., Any]:
        functools.update_wrapper(call, self._target, updated=())
        del call.__wrapped__  # type: ignore[attr-defined]  # no way past the guard
        return call

    def _begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Call | ShadowCall, Callable[[], Any]]:
        """The call, and what calls the backend."""
        if self._judges.settings.mode == "shadow":
            shadow = ShadowCall(
                self._judges, self._shape, lambda: self._arguments.read(args, kwargs)[0]
            )
            return shadow, lambda: self._target(*args, **kwargs)
        given, held = self._arguments.read(args, kwargs)
        call = Call(self._judges, self._shape, given)
        return call, lambda: self._arguments.call(self._target, call.given, held)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        call, ask = self._begin(args, kwargs)
        if inspect.isasyncgenfunction(own_call(self._target)):
            return _async_chunks(call, ask)
        return _chunks(call, ask) if call.streams else _whole(call, ask)

    async def _await(self, *args: Any, **kwargs: Any) -> Any:
        call, ask = self._begin(args, kwargs)
        if call.streams:
            return _async_chunks(call, ask)
        with call:
            if await LOOP.result(call.admitted()):
                reply = await ask()
                if await LOOP.result(call.allows(reply)):
                    return reply
            return call.refuse()


def own_call(target: Callable[..., Any]) -> Callable[..., Any]:
    """What tells of which kind a callable is: an object's is its method's."""
    plain = inspect.isroutine(target) or isinstance(target, functools.partial)
    return target if plain else target.__call__  # type: ignore[operator]


def _whole(call: Call | ShadowCall, ask: Callable[[], Any]) -> Any:
    with call:
        if LOOP.wait(call.admitted()):
            reply = ask()
            if LOOP.wait(call.allows(reply)):
                return reply
        return call.refuse()


def _chunks(call: Call | ShadowCall, ask: Callable[[], Any]) -> Iterator[Any]:
    with call:
        if not LOOP.wait(call.admitted()):
            yield from call.last_words()
            return
        chunks = ask()
        if not isinstance(chunks, Iterator):
            raise TypeError("the reply is not an iterator, though a stream was asked for")
        try:
            for chunk in chunks:
                yield from call.grow(chunk)
                if call.ahead:
                    LOOP.wait(call.room())
                if call.blocked:
                    break
            yield from LOOP.wait(call.rest())
            if call.blocked:
                yield from call.last_words()
        finally:
            if hasattr(chunks, "close"):
                chunks.close()


async def _async_chunks(call: Call | ShadowCall, ask: Callable[[], Any]) -> AsyncIterator[Any]:
    with call:
        if not await LOOP.result(call.admitted()):
            for chunk in call.last_words():
                yield chunk
            return
        asked = ask()
        chunks = await asked if inspect.isawaitable(asked) else asked
        if not isinstance(chunks, AsyncIterator):
            raise TypeError("the reply is not an async iterator, though a stream was asked for")
        try:
            async for chunk in chunks:
                for given in call.grow(chunk):
                    yield given
                if call.ahead:
                    await LOOP.result(call.room())
                if call.blocked:
                    break
            for given in await LOOP.result(call.rest()):
                yield given
            if call.blocked:
                for chunk in call.last_words():
                    yield chunk
        finally:
            close = getattr(chunks, "aclose", None) or getattr(chunks, "close", None)
            if close is not None:
                await close()


_BY_PLACE = inspect.Parameter.POSITIONAL_ONLY
_GATHERED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
