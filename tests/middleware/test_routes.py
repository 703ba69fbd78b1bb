"""Which requests are screened: no spelling of a path leads past the guard."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from guard_middleware import GuardMiddleware
from guard_middleware.formats import FORMATS
from guard_middleware.formats.contract import Format
from guard_middleware.messages import Message
from guard_middleware.routes import Rule, routes
from guard_middleware.settings import Settings
from guard_middleware.testing import FakeGuard, forbids
from tests.middleware.asgi_calls import Backend, call
from tests.middleware.formats.openai_replies import PATH, asking, reply
from tests.middleware.wrapped import BAD, Wrapped

CHAT = next(one for one in FORMATS if one.name == "openai-chat")
GUARDED = Settings().guarded
PASSED = (Rule.UNTOUCHED, Rule.BARE)


def found(method: str, path: str, root: str = "", **settings: Any) -> Format | Rule:
    knobs = Settings(**settings)
    rules = routes(FORMATS, knobs.guarded, knobs.passes, knobs.unknown)
    return rules.find(method, path, root)


SPELLINGS = (
    PATH,
    "//v1/chat/completions",
    "/v1//chat///completions",
    "/v1/chat/completions/",
    "/v1/chat/completions//",
    "/V1/Chat/COMPLETIONS",
    "/v1/./chat/completions",
    "/x/../v1/chat/completions",
    "/../v1/chat/completions",
    "/v1/models/../chat/completions",
    "/v1/%63hat/completions",
    "/v1/chat%2fcompletions",
    "/v1/chat%2Fcompletions",
    "/v1/chat%252fcompletions",
    "/v1/%2e/chat/completions",
    "/v1/models/%2e%2e/chat/completions",
    "/v1/models/.%2e/chat/completions",
    "/v1\\chat\\completions",
    "/v1/chat/completions;x=1",
    "/v1;x/chat;y/completions",
    "/v1/chat/completions\n",
    "/v1/chat/completions\x00",
    "/v1/chat/completions%00",
    "/v1/chat/completions%20",
    "/v1/chat/completion\u017f",
    "v1/chat/completions",
    "http://host/v1/chat/completions",
    "/prefix/v1/chat/completions",
    "/a/b/c/chat/completions",
)


@pytest.mark.parametrize("path", SPELLINGS)
def test_every_spelling_of_an_owned_path_is_read(path: str) -> None:
    assert found("POST", path) is CHAT
    assert found("post", path) is CHAT


@pytest.mark.parametrize("path", SPELLINGS)
@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "QUERY", "TRACE"])
def test_owned_path_is_not_reached_by_another_method(method: str, path: str) -> None:
    assert found(method, path) is Rule.REFUSE


@pytest.mark.parametrize(
    "path",
    [
        "/v1/unknown",
        "/v1/models/../unknown",
        "/v1/models/%2e%2e/unknown",
        "/v1/models/..%2funknown",
        "/v1/models/..;/unknown",
        "/v1/models/\\..\\unknown",
        "/health/../v1/unknown",
        "/%761/unknown",
        "/x%2f..%2fv1/unknown",
        "/api/unknown",
        "/API/unknown",
        "//v1/unknown",
        "/v1/models/a/b/c",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unknown_guarded_path_is_refused(method: str, path: str) -> None:
    assert found(method, path) is Rule.REFUSE
    assert found(method, path, unknown="pass") is Rule.UNTOUCHED


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/a/b", "/metrics", "/"])
def test_health_models_and_metrics_pass_for_reading(path: str) -> None:
    assert found("GET", path) is found("HEAD", path) and found("GET", path) in PASSED
    assert found("POST", path, guarded=("/",)) is not Rule.UNTOUCHED


# Routes that no format reads: the method that passes, if any does, and nothing else.
KNOWN = {
    # llama.cpp
    **dict.fromkeys(("/props", "/lora-adapters", "/v1/health"), "GET"),
    **dict.fromkeys(("/tokenize", "/detokenize", "/apply-template"), "POST"),
    **dict.fromkeys(("/embedding", "/embeddings", "/v1/embeddings"), "POST"),
    **dict.fromkeys(("/rerank", "/reranking", "/v1/rerank", "/v1/reranking"), "POST"),
    **dict.fromkeys(("/slots", "/slots/0", "/models/load", "/models/unload", "/models/sse")),
    **dict.fromkeys(("/cors-proxy", "/audio/transcriptions", "/v1/audio/transcriptions")),
    **dict.fromkeys(("/v1/stream/7", "/v1/streams", "/v1/messages", "/v1/systemone")),
    # vLLM
    **dict.fromkeys(("/ping", "/load", "/version", "/is_sleeping"), "GET"),
    **dict.fromkeys(("/score", "/v1/score", "/v2/rerank", "/v2/embed", "/classify"), "POST"),
    **dict.fromkeys(("/sleep", "/wake_up", "/pause", "/resume", "/collective_rpc")),
    **dict.fromkeys(("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")),
    **dict.fromkeys(("/scale_elastic_ep", "/update_weights", "/init_weight_transfer_engine")),
    **dict.fromkeys(("/abort_requests", "/start_profile", "/stop_profile", "/server_info")),
    **dict.fromkeys(("/tokenizer_info", "/pooling", "/generative_scoring")),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/responses/7")),
    **dict.fromkeys(("/inference/v1/generate", "/v1/audio/translations")),
    # TGI
    "/info": "GET",
    "/chat_tokenize": "POST",
    # Ollama
    **dict.fromkeys(("/api/tags", "/api/ps", "/api/version"), "GET"),
    **dict.fromkeys(("/api/show", "/api/embed", "/api/embeddings"), "POST"),
    **dict.fromkeys(("/api/pull", "/api/push", "/api/create", "/api/delete", "/api/copy")),
    "/api/blobs/sha256:7": None,
}


@pytest.mark.parametrize("path", KNOWN)
def test_known_route_passes_with_its_method_only(path: str) -> None:
    passes = {"GET": ("GET", "HEAD"), "POST": ("POST",), None: ()}[KNOWN[path]]
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
        in_application, in_sidecar = found(method, path), found(method, path, guarded=("/",))
        if method in passes:
            assert in_sidecar is (Rule.BARE if KNOWN[path] == "GET" else Rule.UNTOUCHED)
            assert in_application in PASSED
        else:
            assert in_sidecar is Rule.REFUSE
            assert in_application is Rule.REFUSE or KNOWN[path] is not None
        assert found(method, path, passes=(path,)) is Rule.UNTOUCHED


@pytest.mark.parametrize("path", [path for path, method in KNOWN.items() if method is None])
@pytest.mark.parametrize("trick", ["/health/..{}", "/{}/", "/health/%2e%2e{}", "{}/../health"])
def test_no_spelling_of_a_guarded_route_passes(path: str, trick: str) -> None:
    for spelled in (path, path.upper()):
        assert found("GET", trick.format(spelled)) is Rule.REFUSE
        assert found("POST", trick.format(spelled)) is Rule.REFUSE


@pytest.mark.parametrize("path", ["/props", "/lora-adapters"])
def test_settings_of_a_server_are_read_but_not_written(path: str) -> None:
    assert found("POST", path) is Rule.REFUSE
    assert found("POST", path, unknown="pass") is Rule.UNTOUCHED


@pytest.mark.parametrize("path", ["/static/a.png", "/v10/x", "/apix", "/generated", "/a%20b"])
def test_other_paths_pass(path: str) -> None:
    assert found("GET", path) is found("POST", path) is Rule.UNTOUCHED
    assert found("POST", path, guarded=("/",)) is not Rule.UNTOUCHED


def test_more_paths_pass_where_that_was_set() -> None:
    passes = ("/v1/embeddings", "/v1/files/*")
    for path in ("/v1/embeddings", "/v1/files/7", "/V1//embeddings/"):
        assert found("POST", path, passes=passes) is Rule.UNTOUCHED
    for path in ("/v1/embeddings/x", "/v1/files/7/content", "/v1/files/%2e%2e/x"):
        assert found("POST", path, passes=passes) is Rule.REFUSE


def test_preflight_requests_pass() -> None:
    assert found("OPTIONS", PATH) is Rule.BARE
    assert found("OPTIONS", "/own") is Rule.UNTOUCHED


@pytest.mark.parametrize(("method", "path"), [("OPTIONS", PATH), ("GET", "/v1/models")])
async def test_what_passes_on_guarded_paths_has_no_body(method: str, path: str) -> None:
    """Told by a header or, as HTTP/2 allows, not told."""
    behind = Backend([b"{}"])
    told = await call(
        Wrapped(behind), path, b"text", method=method, headers=[(b"content-length", b"4")]
    )
    assert (told.status, behind.bodies) == (403, [])
    untold = await call(Wrapped(behind), path, b"text", method=method)
    assert (untold.status, behind.bodies) == (200, [b""])


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/llm/v1/unknown", "/llm"),
        ("/llm/v1/unknown", "/llm/"),
        ("/v1/unknown", "/llm"),
        ("/v1/unknown", "/"),
        ("//v1/unknown", "/"),
        ("/llm//v1/unknown", "/llm"),
    ],
)
def test_paths_are_read_below_the_applications_root(path: str, root: str) -> None:
    assert found("POST", path, root) is Rule.REFUSE


def test_root_is_no_part_of_the_path() -> None:
    assert found("POST", "/api/static/x", "/api") is Rule.UNTOUCHED
    assert found("POST", "/apix/v1/unknown", "/api") is Rule.UNTOUCHED


# Through an application that routes: what it would serve is screened or refused.


async def echo(request: Request) -> JSONResponse:
    await request.body()
    return JSONResponse(reply("served"))


def inner() -> Starlette:
    return Starlette(
        routes=[
            Route("/v1/chat/completions", echo, methods=["POST", "GET"]),
            Route("/v1/own", echo, methods=["POST"]),
            Route("/health", lambda request: PlainTextResponse("ok")),
        ]
    )


def outer() -> ASGIApp:
    return Starlette(routes=[Mount("/llm", app=inner()), Mount("/", app=inner())])


def guarded(app: ASGIApp) -> GuardMiddleware:
    return Wrapped(app, FakeGuard(forbids(BAD)))


@pytest.mark.parametrize("path", SPELLINGS)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_nothing_bad_is_served_by_any_spelling(method: str, path: str) -> None:
    mounted = Starlette(routes=[Mount("/llm", app=guarded(inner()))])
    for app, prefix in ((guarded(inner()), ""), (guarded(outer()), "/llm"), (mounted, "/llm")):
        got = await call(app, prefix + path, asking(BAD), method=method)
        assert b"served" not in got.body


async def test_middleware_inside_a_mounted_application_screens_it() -> None:
    app = Starlette(routes=[Mount("/llm", app=guarded(inner()))])
    served = await call(app, f"/llm{PATH}", asking("Hi"))
    refused = await call(app, "/llm/v1/own", asking("Hi"))
    assert served.json == reply("served") and refused.status == 403
    assert (await call(app, "/llm/health", b"", method="GET")).body == b"ok"


async def test_answer_to_a_head_request_has_no_body() -> None:
    got = await call(Wrapped(Backend([b"{}"])), "/v1/unknown", b"", method="HEAD")
    assert (got.status, got.body) == (403, b"")


# What is no request.


async def handshake(app: GuardMiddleware, path: str) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "websocket", "path": path, "headers": []}, receive, send)
    return sent


async def accepting(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "websocket.accept"})


async def test_web_sockets_pass_but_for_guarded_paths() -> None:
    app = Wrapped(accepting)
    assert await handshake(app, "/own/socket") == [{"type": "websocket.accept"}]
    for path in ("/v1/realtime", "/v1/%72ealtime", "//V1/realtime", PATH):
        assert await handshake(app, path) == [{"type": "websocket.close", "code": 1008}]
    assert app.counted("refused_total") == 4


@pytest.mark.parametrize("settings", [{"mode": "shadow"}, {"unknown": "pass"}])
async def test_web_sockets_on_guarded_paths_pass_where_that_was_set(settings: Any) -> None:
    app = Wrapped(accepting, **settings)
    assert await handshake(app, "/v1/realtime") == [{"type": "websocket.accept"}]


async def test_scopes_of_other_kinds_pass() -> None:
    seen: list[str] = []

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await Wrapped(noting)({"type": "own"}, None, None)  # type: ignore[arg-type]
    assert seen == ["own"]


async def test_lifespan_is_the_applications_and_closes_the_guard() -> None:
    class Closing(FakeGuard):
        closed = 0

        async def close(self) -> None:
            self.closed += 1

    guard = Closing()
    sent: list[Message] = []
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await Wrapped(Backend([]), guard)({"type": "lifespan"}, receive, send)
    assert [one["type"] for one in sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert guard.closed == 1


async def test_lifespan_that_an_application_does_not_know_fails_as_without_us() -> None:
    async def knows_http_only(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await Backend([json.dumps(reply("Hello.")).encode()])(scope, receive, send)

    app = Wrapped(knows_http_only)
    with pytest.raises(AssertionError):
        await app({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert (await call(app, PATH, asking("Hi"))).json == reply("Hello.")
