"""What each protocol can say, for the table in the README: requests and replies with a mark where
the feature is. test_features.py sees what becomes of the mark.
"""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

from guard_middleware.formats import eventstream
from tests.middleware.asgi_calls import sse
from tests.middleware.formats import openai_responses_replies as responses
from tests.middleware.formats.bedrock_speech import BedrockSpeech
from tests.middleware.formats.llama_cpp_speech import LlamaCppSpeech
from tests.middleware.formats.llama_stack_speech import (
    LlamaStackChatSpeech,
    LlamaStackCompletionSpeech,
)
from tests.middleware.formats.ollama_speech import OllamaChatSpeech, OllamaGenerateSpeech, ndjson
from tests.middleware.formats.openai_chat_speech import OpenAIChatSpeech
from tests.middleware.formats.openai_responses_speech import OpenAIResponsesSpeech
from tests.middleware.formats.openai_text_speech import OpenAITextSpeech
from tests.middleware.formats.speech import Said, Speech
from tests.middleware.formats.tgi_speech import DETAILS, TgiSpeech, token

COLUMNS: dict[str, Speech] = {
    "chat": OpenAIChatSpeech(),
    "responses": OpenAIResponsesSpeech(),
    "completions": OpenAITextSpeech(),
    "Ollama chat": OllamaChatSpeech(),
    "Ollama generate": OllamaGenerateSpeech(),
    "TGI": TgiSpeech(),
    "llama.cpp": LlamaCppSpeech(),
    "Bedrock": BedrockSpeech(),
    "Stack chat": LlamaStackChatSpeech(),
    "Stack completion": LlamaStackCompletionSpeech(),
}
MARK = "a marked text"
NUMBER = 31_337  # a mark where only a number may be
IMAGE = b"\x89PNG a marked picture"
ENCODED = base64.b64encode(IMAGE).decode()
DATA_URI = f"data:image/png;base64,{ENCODED}"
ADDRESS = f"https://example.com/{MARK.replace(' ', '-')}.png"


class At(NamedTuple):
    """A request on another path than the column's."""

    path: str
    body: dict[str, Any]


def turns(*content: tuple[str, object], **last: Any) -> dict[str, Any]:
    """Messages, as most protocols have them; `last` belongs to the last one."""
    messages: list[dict[str, Any]] = [{"role": role, "content": said} for role, said in content]
    messages[-1] |= last
    return {"messages": messages}


def items(*content: tuple[str, object]) -> dict[str, Any]:
    """Messages, as /v1/responses has them."""
    return {"input": turns(*content)["messages"]}


def blocks(*content: tuple[str, object]) -> dict[str, Any]:
    """Messages, as Bedrock has them: one block each."""
    return turns(*((role, [block]) for role, block in content))


HI, HELLO = ("user", "Hi"), ("assistant", "Hello.")
B_HI = ("user", {"text": "Hi"})
PAST = ("user", MARK), HELLO, HI
SYSTEM = ("system", MARK), HI
BEGUN = HI, ("assistant", MARK)
SCHEMA = {"type": "object", "description": MARK}
FUNCTION = {"name": "look", "description": MARK, "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": MARK}}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": MARK}
OLLAMA_CALL = {"function": {"name": "look", "arguments": {"at": MARK}}}
STACK_CALL = {"call_id": "c1", "tool_name": "look", "arguments": MARK}
STACK_TOOL = {"tool_name": "look", "description": MARK}
FORMAT = {"type": "json_schema", "json_schema": SCHEMA}
AUDIO = {"type": "input_audio", "input_audio": {"data": MARK, "format": "wav"}}
S3 = {"s3Location": {"uri": f"s3://bucket/{MARK}"}}

# For each feature and column what a request says besides, or instead of, a turn of the user.
REQUESTS: dict[str, dict[str, dict[str, Any] | At]] = {
    "earlier turns": {
        "chat": turns(*PAST),
        "responses": items(*PAST),
        "Ollama chat": turns(*PAST),
        "Bedrock": blocks(("user", {"text": MARK}), ("assistant", {"text": "Hello."}), B_HI),
        "Stack chat": turns(*PAST[:1], HELLO, HI),
    },
    "prefill (the reply's beginning)": {
        "chat": turns(*BEGUN),
        "responses": items(*BEGUN),
        "Ollama chat": turns(*BEGUN),
        "Bedrock": blocks(B_HI, ("assistant", {"text": MARK})),
        "Stack chat": turns(*BEGUN),
    },
    "system turn": {
        "chat": turns(*SYSTEM),
        "responses": {"instructions": MARK},
        "Ollama chat": turns(*SYSTEM),
        "Ollama generate": {"system": MARK},
        "Bedrock": {"system": [{"text": MARK}]},
        "Stack chat": turns(*SYSTEM),
    },
    "developer turn": {
        "chat": turns(("developer", MARK), HI),
        "responses": items(("developer", MARK), HI),
        "Ollama chat": turns(("developer", MARK), HI),
    },
    "content in parts": {
        "chat": turns(("user", [{"type": "text", "text": MARK}])),
        "responses": items(("user", [{"type": "input_text", "text": MARK}])),
        "llama.cpp": {"prompt": {"prompt_string": MARK}},
        "Bedrock": blocks(("user", {"text": MARK})),
        "Stack chat": turns(("user", [{"type": "text", "text": MARK}])),
        "Stack completion": {"content": [{"type": "text", "text": MARK}]},
    },
    "image in base64 or a data URI": {
        "chat": turns(("user", [{"type": "image_url", "image_url": {"url": DATA_URI}}])),
        "responses": items(("user", [{"type": "input_image", "image_url": DATA_URI}])),
        "completions": {"multi_modal_data": {"image": DATA_URI}},
        "Ollama chat": turns(HI, images=[ENCODED]),
        "Ollama generate": {"images": [ENCODED]},
        "TGI": {"inputs": f"![]({DATA_URI})What is this?"},
        "llama.cpp": {"prompt": {"prompt_string": "<m>", "multimodal_data": [ENCODED]}},
        "Bedrock": blocks(
            ("user", {"image": {"format": "png", "source": {"bytes": ENCODED}}}),
        ),
        "Stack chat": turns(("user", {"type": "image", "image": {"data": ENCODED}})),
        "Stack completion": {"content": {"type": "image", "image": {"data": ENCODED}}},
    },
    "image behind an address": {
        "chat": turns(("user", [{"type": "image_url", "image_url": {"url": ADDRESS}}])),
        "responses": items(("user", [{"type": "input_image", "image_url": ADDRESS}])),
        "completions": {"multi_modal_data": {"image": ADDRESS}},
        "Ollama chat": turns(HI, images=[ADDRESS]),
        "Ollama generate": {"images": [ADDRESS]},
        "TGI": {"inputs": f"![]({ADDRESS})What is this?"},
        "llama.cpp": {"prompt": {"prompt_string": "<m>", "multimodal_data": [ADDRESS]}},
        "Bedrock": blocks(("user", {"image": {"format": "png", "source": S3}})),
        "Stack chat": turns(("user", {"type": "image", "image": {"url": {"uri": ADDRESS}}})),
        "Stack completion": {"content": {"type": "image", "image": {"url": {"uri": ADDRESS}}}},
    },
    "audio, files, unknown parts": {
        "chat": turns(("user", [AUDIO])),
        "responses": items(("user", [{"type": "input_file", "file_data": MARK}])),
        "Ollama chat": turns(HI, audio=MARK),
        "Bedrock": blocks(("user", {"audio": {"format": "wav", "source": {"bytes": MARK}}})),
        "Stack chat": turns(("user", [AUDIO])),
        "Stack completion": {"content": [AUDIO]},
    },
    "tool definitions": {
        "chat": {"tools": TOOLS},
        "responses": {"tools": [{"type": "function", **FUNCTION}]},
        "Ollama chat": {"tools": TOOLS},
        "TGI": {"parameters": {"tools": TOOLS}},
        "Bedrock": {"toolConfig": {"tools": [{"toolSpec": {"name": "x", "description": MARK}}]}},
        "Stack chat": {"tools": [STACK_TOOL]},
    },
    "tool calls": {
        "chat": turns(HI, ("assistant", None), tool_calls=[CALL]),
        "responses": {
            "input": [{"type": "function_call", "call_id": "c1", "name": "x", "arguments": MARK}]
        },
        "Ollama chat": turns(
            HI,
            ("assistant", ""),
            tool_calls=[{"function": {"name": "x", "arguments": {"a": MARK}}}],
        ),
        "Bedrock": blocks(
            B_HI,
            ("assistant", {"toolUse": {"toolUseId": "c1", "name": "x", "input": {"a": MARK}}}),
        ),
        "Stack chat": turns(HI, ("assistant", ""), tool_calls=[STACK_CALL]),
    },
    "tool results": {
        "chat": turns(HI, ("tool", MARK), tool_call_id="c1"),
        "responses": {"input": [RESULT]},
        "Ollama chat": turns(HI, ("tool", MARK)),
        "Bedrock": blocks(
            B_HI, ("user", {"toolResult": {"toolUseId": "c1", "content": [{"text": MARK}]}})
        ),
        "Stack chat": turns(HI, ("tool", MARK), call_id="c1"),
    },
    "response format, grammar": {
        "chat": {"response_format": FORMAT},
        "responses": {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        "completions": {"response_format": FORMAT},
        "Ollama chat": {"format": SCHEMA},
        "Ollama generate": {"format": SCHEMA},
        "TGI": {"parameters": {"grammar": {"type": "json", "value": SCHEMA}}},
        "llama.cpp": {"json_schema": SCHEMA},
        "Bedrock": {"outputConfig": {"textFormat": {"structure": {"jsonSchema": SCHEMA}}}},
        "Stack chat": {"response_format": FORMAT},
        "Stack completion": {"response_format": FORMAT},
    },
    "text behind the reply (suffix)": {
        "completions": {"suffix": MARK},
        "Ollama generate": {"suffix": MARK},
        "llama.cpp": At("/infill", {"input_prefix": "Hi", "input_suffix": MARK}),
    },
    "second prompt of a batch": {
        "completions": {"prompt": ["Hi", MARK]},
        "llama.cpp": {"prompt": ["Hi", MARK]},
        "Stack chat": At(
            "/inference/batch-chat-completion",
            {"messages_batch": [turns(HI)["messages"], turns(("user", MARK))["messages"]]},
        ),
        "Stack completion": At("/inference/batch-completion", {"content_batch": ["Hi", MARK]}),
    },
    "token ids as a prompt": {
        "completions": {"prompt": [NUMBER]},
        "llama.cpp": {"prompt": ["Hi", [NUMBER]]},
    },
    "what the server has kept": {
        "responses": {"previous_response_id": "resp_7"},
        "Ollama generate": {"context": [NUMBER]},
        "Bedrock": At("/model/arn:aws:bedrock:eu:7:prompt/P/converse", {"promptVariables": {}}),
    },
    "own prompt template": {
        "chat": {"chat_template": MARK},
        "responses": {"prompt": {"id": MARK}},
        "completions": {"chat_template": MARK},
        "Ollama chat": {"template": MARK},
        "Ollama generate": {"template": MARK},
        "TGI": {"parameters": {"chat_template": MARK}},
        "llama.cpp": {"system_prompt": {"prompt": MARK}},
        "Bedrock": {"promptVariables": {"a": {"text": MARK}}},
    },
    "where to stop": {
        "chat": {"stop": [MARK]},
        "responses": {"stop": [MARK]},
        "completions": {"stop": [MARK]},
        "Ollama chat": {"options": {"stop": [MARK]}},
        "Ollama generate": {"options": {"stop": [MARK]}},
        "TGI": {"parameters": {"stop": [MARK]}},
        "llama.cpp": {"stop": [MARK]},
        "Bedrock": {"inferenceConfig": {"stopSequences": [MARK]}},
        "Stack chat": {"sampling_params": {"stop": [MARK]}},
        "Stack completion": {"sampling_params": {"stop": [MARK]}},
    },
    "unknown keys": {column: {"mood": MARK} for column in COLUMNS},
}

# For each feature and column: a channel of its speech, what a whole reply says besides, or the
# first event of a stream.
REPLIES: dict[str, dict[str, Said | dict[str, Any] | bytes]] = {
    "text": {column: Said(0, one.channels[0]) for column, one in COLUMNS.items()},
    "further choices": {
        "chat": Said(1, "content"),
        "completions": Said(1, "text"),
        "TGI": {"details": {**DETAILS, "best_of_sequences": [{"generated_text": MARK}]}},
        "llama.cpp": Said(1, "content"),
    },
    "reasoning": {
        "chat": Said(0, "reasoning_content"),
        "responses": Said(0, "reasoning"),
        "Ollama chat": Said(0, "thinking"),
        "Ollama generate": Said(0, "thinking"),
        "Bedrock": Said(0, "reasoning"),
    },
    "tool calls": {
        "chat": Said(0, "arguments"),
        "responses": Said(0, "arguments"),
        "Ollama chat": Said(0, "arguments"),
        "Bedrock": Said(0, "arguments"),
        "Stack chat": Said(0, "arguments"),
    },
    "log-probabilities": {
        column: Said(0, "alternatives")
        for column, one in COLUMNS.items()
        if "alternatives" in one.channels
    },
    "echo of another prompt": {
        "responses": {"instructions": MARK},
        "completions": Said(0, "text"),
        "TGI": {"details": {**DETAILS, "prefill": [token(MARK)]}},
        "llama.cpp": {"prompt": MARK},
    },
    "token ids without text": {
        "chat": sse({"choices": [{"index": 0, "delta": {}, "token_ids": [NUMBER]}]}, done=False),
        "completions": sse(
            {"choices": [{"index": 0, "text": "", "token_ids": [NUMBER]}]}, done=False
        ),
        "llama.cpp": sse(
            {"index": 0, "content": "", "tokens": [NUMBER], "stop": False}, done=False
        ),
    },
    "images, audio": {
        "chat": {"choices": [{"index": 0, "message": {"audio": {"transcript": MARK}}}]},
        "responses": responses.response(
            {"type": "image_generation_call", "id": "i", "result": ENCODED}
        ),
        "completions": {"image": DATA_URI},
        "Ollama chat": {"message": {"role": "assistant", "content": "", "images": [ENCODED]}},
        "Ollama generate": {"image": ENCODED},
        "TGI": {"image": DATA_URI},
        "llama.cpp": {"image": DATA_URI},
        "Bedrock": {
            "output": {"message": {"content": [{"image": {"source": {"bytes": ENCODED}}}]}}
        },
        "Stack chat": {"completion_message": {"content": [{"type": "image", "image": MARK}]}},
        "Stack completion": {"content": [{"type": "image", "image": MARK}]},
    },
    "usage, timings": {
        "chat": sse({"choices": [], "usage": {"total_tokens": NUMBER}}, done=False),
        "responses": {"usage": {"total_tokens": NUMBER}},
        "completions": sse({"choices": [], "usage": {"total_tokens": NUMBER}}, done=False),
        "Ollama chat": {"eval_count": NUMBER},
        "Ollama generate": {"eval_count": NUMBER},
        "TGI": {"details": {**DETAILS, "generated_tokens": NUMBER}},
        "llama.cpp": {"timings": {"prompt_n": NUMBER}},
        "Bedrock": {"usage": {"totalTokens": NUMBER}},
        "Stack chat": {"metrics": [{"metric": "total_tokens", "value": NUMBER}]},
        "Stack completion": {"metrics": [{"metric": "total_tokens", "value": NUMBER}]},
    },
    "unknown keys": {column: Said(0, "unknown") for column in COLUMNS},
    "error in a stream": {
        "chat": sse({"error": {"message": MARK}}, done=False),
        "responses": responses.numbered([{"type": "error", "message": MARK}])[0],
        "completions": sse({"error": {"message": MARK}}, done=False),
        "Ollama chat": ndjson({"error": MARK}),
        "Ollama generate": ndjson({"error": MARK}),
        "TGI": sse({"error": MARK, "error_type": "generation"}, done=False),
        "llama.cpp": sse({"error": {"code": 500, "message": MARK}}, done=False),
        "Bedrock": eventstream.exception("internalServerException", {"message": MARK}),
        "Stack chat": sse({"error": {"message": MARK}}, done=False),
        "Stack completion": sse({"error": {"message": MARK}}, done=False),
    },
}
