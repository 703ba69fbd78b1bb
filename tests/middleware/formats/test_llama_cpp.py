"""llama.cpp's own protocol: requests, whole replies, streams and how they end."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from guard_middleware.formats.contract import Asked, Refusal, Unreadable
from guard_middleware.formats.llama_cpp import LlamaCpp
from guard_middleware.testing import FakeGuard
from tests.middleware.asgi_calls import EVENTS, Backend, call
from tests.middleware.formats.llama_cpp_speech import (
    INFILL,
    PATH,
    SETTINGS,
    LlamaCppSpeech,
    asking,
    chance,
    chunks,
    reply,
    step,
    steps,
)
from tests.middleware.wrapped import BAD, SAFE, Wrapped

PNG = base64.b64encode(b"\x89PNG picture").decode()
REFUSAL = Refusal("No.", "7", 1_700_000_000)


def read(prompt: object = "Hi", path: str = PATH, **more: Any) -> Asked:
    return LlamaCpp().read_request(path, asking(prompt, **more))


def said(asked: Asked) -> list[list[tuple[str, list[Any]]]]:
    """Role and texts of each turn of each prompt; images are told by their type."""
    return [[(turn.role, _texts(turn.content["content"])) for turn in one] for one in asked.prompts]


def _texts(content: Any) -> list[Any]:
    parts = [{"text": content}] if isinstance(content, str) else content
    return [part.get("text", part.get("type")) for part in parts]


def pieces(body: object, asked: Asked | None = None) -> dict[tuple[int, str], str]:
    found: dict[tuple[int, str], str] = {}
    for piece in LlamaCpp().read_reply(asked or read(), body):  # type: ignore[arg-type]
        key = (piece.channel.choice, piece.channel.name)
        found[key] = found.get(key, "") + piece.text
    return found


# Requests.


@pytest.mark.parametrize(
    ("prompt", "texts", "unread"),
    [
        ("Hi", [["Hi"]], ()),
        (None, [[""]], ()),
        ([1, 2], [[""]], ("prompt",)),
        ([1, "Hi", 2, "Ho"], [["Hi", "Ho"]], ("prompt",)),
        ({"prompt_string": "Hi"}, [["Hi"]], ()),
        ({"prompt_string": "<m> Hi", "multimodal_data": [PNG]}, [["<m> Hi", "image"]], ()),
        (["Hi", "Ho"], [["Hi"], ["Ho"]], ()),
        (["Hi", [1, 2]], [["Hi"], [""]], ("prompt[1]",)),
        ([[1, "Hi"], {"prompt_string": "Ho"}], [["Hi"], ["Ho"]], ("prompt[0]",)),
    ],
)
def test_each_prompt_is_a_turn_of_the_user(
    prompt: object, texts: list[list[str]], unread: tuple[str, ...]
) -> None:
    asked = read(prompt)
    assert said(asked) == [[("user", one)] for one in texts]
    assert asked.unread == unread


def test_infill_is_judged_in_the_order_in_which_the_model_reads_it() -> None:
    body = {
        "input_extra": [{"filename": "a.py", "text": "import os"}],
        "input_prefix": "def f(",
        "input_suffix": "return 1",
        "prompt": "x",
    }
    asked = LlamaCpp().read_request(INFILL, body)
    assert said(asked) == [[("user", ["a.py", "import os", "def f(", "return 1", "x"])]]
    assert said(LlamaCpp().read_request(INFILL, {})) == [[("user", [""])]]


def test_images_beside_the_prompt_are_judged_with_it() -> None:
    asked = read("[img-1] Hi", image_data=[{"id": 1, "data": PNG}])
    assert said(asked) == [[("user", ["[img-1] Hi", "image"])]]


def test_choices_belong_to_their_prompts() -> None:
    asked = read(["Hi", "Ho"], n_cmpl=2, n=7)
    owners = [asked.prompt_of(choice)[0].content["content"][0]["text"] for choice in range(4)]
    assert owners == ["Hi", "Hi", "Ho", "Ho"]
    assert read("Hi", n=3).choices == 3


def test_what_steers_is_not_judged_and_all_else_is() -> None:
    steers: dict[str, Any] = {"temperature": 0.5, "samplers": ["top_k"], "stop": ["two words"]}
    steers |= {"seed": -1, "lora": [{"id": 0, "scale": 0.5}], "logit_bias": [[7, False]]}
    assert said(read(**steers)) == [[("user", ["Hi"])]]
    for more in ({"grammar": "root ::= x"}, {"samplers": ["a b"]}, {"input_suffix": "x"}):
        (role, texts), _ = said(read(**more))[0]
        assert role == "system" and next(iter(more)) in texts[0]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PATH, []),
        (PATH, {"prompt": []}),
        (PATH, {"prompt": [1, ["Hi"]]}),
        (PATH, {"prompt": [True, "Hi"]}),
        (PATH, {"prompt": [1.5]}),
        (PATH, {"prompt": {"prompt_string": "Hi", "text": "Ho"}}),
        (PATH, {"prompt": {"prompt_string": ["Hi"]}}),
        (PATH, {"prompt": {"prompt_string": "Hi", "multimodal_data": ["a b"]}}),
        (PATH, {"prompt": {"prompt_string": "Hi", "multimodal_data": PNG}}),
        (PATH, {"prompt": "Hi", "image_data": [PNG]}),
        (PATH, {"prompt": ["Hi", "Ho"], "image_data": [{"id": 1, "data": PNG}]}),
        (PATH, {"Prompt": "Hi"}),
        (PATH, {"prompt": "Hi", "stream": 1}),
        (PATH, {"prompt": "Hi", "n_cmpl": 129}),
        (PATH, {"prompt": ["Hi"] * 9, "n_cmpl": 128}),
        (PATH, {"prompt": ["Hi"] * 6, "grammar": "x" * 2**20}),
        (PATH, {"prompt": "Hi", "system_prompt": {"prompt": "x"}}),
        (INFILL, {"prompt": ["Hi"]}),
        (INFILL, {"input_prefix": 1}),
        (INFILL, {"input_extra": {"text": "x"}}),
        (INFILL, {"input_extra": [{"text": "x", "note": "y"}]}),
    ],
)
def test_requests_that_cannot_be_judged_are_unreadable(path: str, body: Any) -> None:
    with pytest.raises(Unreadable):
        LlamaCpp().read_request(path, body)


# Replies.


def test_every_text_of_a_reply_is_a_piece() -> None:
    body = reply(
        "Mild.",
        note="n n",
        stopping_word="Now",
        completion_probabilities=[chance("Mi", "Ho"), chance("ld", "ot")],
        generation_settings={**SETTINGS, "grammar": "be bad", "stop": ["be worse"]},
    )
    assert pieces(body) == {
        (0, "content"): "Mild.",
        (0, "logprobs.content"): "Mild",
        (0, "logprobs.content.top[0]"): "Hoot",
        (0, "generation_settings.grammar"): "be bad",
        (0, "generation_settings.stop[0]"): "be worse",
        (0, ".note"): "n n",
        (0, ".stopping_word"): "Now",
    }


def test_probabilities_behind_the_samplers_are_read_as_those_before() -> None:
    other = {**chance("Ho"), "prob": 0.5}
    entry = {**chance("Mild."), "top_probs": [other, {**other, "token": "Ha"}]}
    found = pieces(reply("Mild.", completion_probabilities=[entry]))
    assert found[0, "logprobs.content.top[0]"] == "Ho"
    assert (0, "logprobs.content") not in found
    old = {"content": " Mi", "probs": [{"tok_str": " Ho", "prob": 0.5}]}
    assert " Ho" in pieces(reply("Mild.", completion_probabilities=[old])).values()


def test_echoes_are_judged_unless_they_were() -> None:
    settings = {**SETTINGS, "stop": ["two words"], "grammar": "root ::= x"}
    asked = read("Hi", stop=["two words"], grammar="root ::= x")
    assert pieces(reply("a", generation_settings=settings), asked) == {(0, "content"): "a"}
    for prompt in ("Hi", "<|begin_of_text|>Hi", "<s>Hi"):
        assert pieces(reply("a", prompt=prompt)) == {(0, "content"): "a"}
    for prompt in ("Oh Hi", "Hi!", "<|how to|>Hi"):
        assert pieces(reply("a", prompt=prompt))[0, "prompt"] == prompt


def test_replies_to_several_prompts_are_told_apart() -> None:
    asked = read(["Hi", "Ho"])
    found = pieces([reply("a"), reply("b", 1, prompt="Ho"), {"content": "c"}], asked)
    assert found == {(0, "content"): "a", (1, "content"): "b", (2, "content"): "c"}


@pytest.mark.parametrize(
    "body",
    [
        7,
        [7],
        {"content": 7},
        {"content": ["x"]},
        {"index": -1, "content": "x"},
        {"prompt": ["x"]},
        {"tokens": [7, 8]},
        {"content": "", "tokens": [7, 8]},
        {"content": "x", "generation_settings": [1]},
        {"content": "x", "completion_probabilities": [chance("a", *["b"] * 40)]},
        {"content": "x", "image": f"data:image/png;base64,{PNG}"},
    ],
)
def test_replies_of_another_shape_are_unreadable(body: Any) -> None:
    with pytest.raises(Unreadable):
        pieces(body)


# Streams.


def test_token_ids_leave_with_their_text_only() -> None:
    bare, told = step("", tokens=[7]), step("Hi", tokens=[8])
    reader = LlamaCpp().open_stream(read(stream=True), EVENTS)
    first, second = reader.feed(b"".join(chunks([bare, told])))
    assert json.loads(first.raw[6:]) == {**bare, "tokens": []}
    assert second.raw == chunks([told])[0]


async def test_an_allowed_stream_passes_byte_for_byte() -> None:
    stream = chunks(steps(SAFE))
    got = await call(Wrapped(Backend(stream, EVENTS), FakeGuard()), PATH, asking(stream=True))
    assert got.body == b"".join(stream)


@pytest.mark.parametrize("seen", [0, 2, 3])
def test_a_cut_stream_ends_every_choice_that_was_open(seen: int) -> None:
    reader = LlamaCpp().open_stream(read(n_cmpl=2, stream=True), EVENTS)
    events = [step("Hello"), step(", you.", 1), reply("", 0)]
    for event in reader.feed(b"".join(chunks(events)))[:seen]:
        reader.released(event)
    ends = reader.refuse(REFUSAL)
    heard = LlamaCppSpeech().heard(b"".join(chunks(events)[:seen]) + ends, streamed=True)
    texts = {one.choice: text for one, text in heard.items() if one.channel == "content"}
    assert texts == ({0: "No.", 1: "No."} if seen == 0 else {0: "Hello", 1: ", you."})
    assert LlamaCppSpeech().refused(ends, streamed=True)


@pytest.mark.parametrize("end", [reply(""), {"error": {"code": 500, "message": "It broke."}}])
def test_nothing_follows_a_stream_that_was_over(end: dict[str, Any]) -> None:
    reader = LlamaCpp().open_stream(read(stream=True), EVENTS)
    for event in reader.feed(b"".join(chunks([step("Hi"), end])) + b"data: [DONE]\n\n"):
        reader.released(event)
    assert reader.refuse(REFUSAL) == reader.abort() == b""


def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    reader = LlamaCpp().open_stream(read(stream=True), EVENTS)
    error = json.loads(reader.abort().removeprefix(b"data: "))["error"]
    assert (error["code"], error["type"]) == (502, "upstream_failed")


# Through the middleware.


@pytest.mark.parametrize("path", [PATH, "/completions", "/Completion/", INFILL])
async def test_prompts_are_judged_on_every_path(path: str) -> None:
    behind = Backend([json.dumps(reply("Hello.")).encode()])
    app = Wrapped(behind)
    body = {"input_prefix": BAD} if path == INFILL else asking(BAD)
    got = await call(app, path, body)
    assert got.json["content"] == "I can't help with that."
    assert (got.json["stop"], got.json["stop_type"]) == (True, "content_filter")
    assert behind.bodies == []


async def test_a_refusal_of_several_prompts_is_a_list() -> None:
    got = await call(Wrapped(Backend([])), PATH, asking(["Hi", BAD], n_cmpl=2))
    assert [one["index"] for one in got.json] == [0, 1, 2, 3]


async def test_errors_have_the_servers_shape() -> None:
    got = await call(Wrapped(Backend([])), PATH, asking(n_cmpl=0.5))
    error = got.json["error"]
    assert got.status == error["code"] == 400 and error["type"] == "invalid_request"
