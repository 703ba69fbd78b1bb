"""GuardMiddleware: pure ASGI, around any application that speaks a protocol of `formats`."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from guard_middleware.bodies import has_body, without_body
from guard_middleware.context import Context
from guard_middleware.exchange import Exchange
from guard_middleware.formats import FORMATS
from guard_middleware.formats.contract import Format
from guard_middleware.guards import Guard, open_guard
from guard_middleware.messages import App, Receive, Scope, Send, answer
from guard_middleware.metrics import Metrics, shared
from guard_middleware.routes import Rule, routes
from guard_middleware.settings import Settings, from_environment
from guard_middleware.shadow import Shadows
from guard_middleware.tracing import tracing_of

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

LOG = logging.getLogger(__name__)


class GuardMiddleware:
    """Screens what goes into an application's models and what comes out of them.

    `guard` is an address, a Guard, or nothing: then the settings say which, and they name a guard
    in this process unless told otherwise. Settings come from the environment (GUARDED_*)
    and from keywords, which go first; or they are given as a whole. With `tracing`, spans go to
    `tracer_provider`, or to the application's own. Raises SettingsError.
    """

    def __init__(
        self,
        app: App,
        guard: str | Guard | None = None,
        *,
        settings: Settings | None = None,
        metrics: Metrics | None = None,
        tracer_provider: TracerProvider | None = None,
        **given: Any,
    ) -> None:
        if isinstance(guard, str):
            given["guard"] = guard
        self.settings = settings or from_environment(**given)
        tracing = tracing_of(self.settings, tracer_provider)
        self.guard: Guard = (
            open_guard(self.settings, tracing) if guard is None or isinstance(guard, str) else guard
        )
        self._context = Context(app, self.guard, self.settings, metrics or shared(), tracing)
        self._app = app
        self._shadows = Shadows(self._context) if self.settings.mode == "shadow" else None
        rules = routes(FORMATS, self.settings.guarded, self.settings.passes, self.settings.unknown)
        self._find = lru_cache(maxsize=256)(rules.find)  # some 16 MiB, were all targets 64 KiB long
        self._find_socket = rules.find_socket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        found = self.find(scope)
        if isinstance(found, Rule):
            if found is Rule.REFUSE or found is Rule.BARE and has_body(scope["headers"]):
                await self._refuse(scope, receive, send)
            else:
                bare = found is Rule.BARE and self._shadows is None
                await self._app(scope, without_body(receive) if bare else receive, send)
        elif self._shadows is not None:
            await self._shadows.run(found, scope, receive, send)
        else:
            await Exchange(self._context, found).run(scope, receive, send)

    def find(self, scope: Scope) -> Format | Rule:
        """The format that reads a request, or the rule for it."""
        where = (str(scope["path"]), str(scope.get("root_path", "")))
        if scope["type"] == "http":
            return self._find(scope["method"], *where)
        return self._find_socket(*where)

    async def close(self) -> None:
        """Let go of the guard; what shadow mode has under way is finished before."""
        if self._shadows is not None:
            await self._shadows.close()
        await self.guard.close()

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            await self.close()

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._context.metrics.refused.inc()
        LOG.warning("a request on a guarded path that no format knows")
        if self._shadows is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        else:
            await answer(send, replace(REFUSED, body=b"") if scope["method"] == "HEAD" else REFUSED)


POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1; before a socket is accepted it is an HTTP 403

REFUSED = FORMATS[0].error(
    403, "not_screened", "Requests to this path cannot be screened and are not let through."
)
