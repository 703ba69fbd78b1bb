"""What OpenAI's chat and text completions have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from guard_middleware.formats import fields, sse
from guard_middleware.formats.contract import Answer, Asked, Channel, Piece, Refusal, Unreadable
from guard_middleware.strict_json import dump

DONE = b"data: [DONE]\n\n"

# Of requests: what steers the backend and is plain.
CONTROLS = fields.names(
    """
    model stream stream_options n best_of temperature top_p top_k min_p typical_p max_tokens
    max_completion_tokens min_tokens presence_penalty frequency_penalty repetition_penalty
    length_penalty logit_bias logprobs top_logprobs prompt_logprobs echo seed stop_token_ids
    store service_tier parallel_tool_calls reasoning_effort verbosity modalities
    ignore_eos skip_special_tokens include_stop_str_in_output
    spaces_between_special_tokens use_beam_search early_stopping add_generation_prompt
    continue_final_message add_special_tokens request_id priority return_token_ids
    return_tokens_as_token_ids include_reasoning keep_alive timings_per_token mirostat
    """
)
# Of requests: text that no model reads.
LABELS = fields.names("stop user metadata safety_identifier prompt_cache_key cache_salt")
# Of requests: what changes the prompt behind the guard's back.
UNJUDGEABLE = fields.names(
    """
    chat_template prompt_embeds mm_processor_kwargs kv_transfer_params
    logits_processors vllm_xargs custom_params previous_response_id audio template raw context
    """
)
# Of replies: what the backend, not the model, writes.
REPLY_KEYS = fields.names(
    """
    id object created model system_fingerprint service_tier usage timings prompt_token_ids
    kv_transfer_params x_groq provider metadata
    """
)
_LOGPROB_STRUCTURE = frozenset({"logprob"})
_RANKED = ("top_logprobs", "top_probs")  # the second is llama.cpp's
_MOST_RANKS = 32


def head(asked: Asked, refusal: Refusal, kind: str) -> dict[str, Any]:
    """The beginning of a reply of ours."""
    return {
        "id": f"chatcmpl-{refusal.id}",
        "object": kind,
        "created": refusal.created,
        "model": asked.model,
    }


def error(status: int, code: str, message: str) -> Answer:
    """OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Answer(status, "application/json", dump(body))


def broken_stream() -> bytes:
    """What a client gets when the backend breaks off: an error, which the clients raise."""
    answer = error(502, "upstream_failed", "The model's stream broke off.")
    return sse.event(answer.body) + DONE


def choice_index(choice: Mapping[str, Any]) -> int:
    """A choice's number."""
    return fields.count(choice.get("index"), "choices[].index", 0, 1023)


def bare_ids(choices: Sequence[Any], pieces: Sequence[Piece]) -> list[Any]:
    """The choices with ids of tokens and without text: where a backend holds back a part of the
    text, ids run ahead of it, and nobody can judge them."""
    said = {piece.channel.choice for piece in pieces}
    return [one for one in choices if one.get("token_ids") and choice_index(one) not in said]


def with_ids(reply: Mapping[str, Any], pieces: Sequence[Piece]) -> Sequence[Piece]:
    """The pieces of a whole reply. Raises Unreadable for ids of tokens without their text."""
    if bare_ids(fields.array(reply.get("choices"), "choices"), pieces):
        raise Unreadable("a choice has token ids without the text that they stand for")
    return pieces


def logprob_pieces(logprobs: object, message: Mapping[str, Any], index: int) -> Iterator[Piece]:
    """Texts of chosen tokens, unless they are the very text they belong to, and of alternatives: a
    channel for each rank, for that is how they are read."""
    if logprobs is None:
        return
    groups = fields.obj(logprobs, "logprobs")
    for name, listed in groups.items():
        if name not in ("content", "refusal"):
            yield from fields.tree_pieces({name: listed}, index, "logprobs")
            continue
        entries = [fields.obj(one, "logprobs[]") for one in fields.array(listed, "logprobs[]")]
        chosen = "".join(fields.text(one.get("token"), "token") for one in entries)
        same = chosen == message.get(name)
        for one in entries:
            yield from _entry(one, index, f"logprobs.{name}", known=same)
            ranks = [rank for key in _RANKED for rank in fields.array(one.get(key), key)]
            if len(ranks) > _MOST_RANKS:
                raise Unreadable("top_logprobs has too many entries")
            for rank, alternative in enumerate(ranks):
                yield from _entry(
                    fields.obj(alternative, "top_logprobs[]"), index, f"logprobs.{name}.top[{rank}]"
                )


def _entry(entry: Mapping[str, Any], index: int, name: str, known: bool = False) -> Iterator[Piece]:
    token = fields.text(entry.get("token"), "token")
    if token and not known:
        yield Piece(Channel(index, name), token)
    spelled = entry.get("bytes")
    if spelled is not None and spelled != list(token.encode()):
        yield Piece(Channel(index, f"{name}.bytes"), _decoded(spelled))
    rest = {k: v for k, v in entry.items() if k not in ("token", "bytes", *_RANKED)}
    yield from fields.other_pieces(rest, _LOGPROB_STRUCTURE, index, name)


def _decoded(spelled: object) -> str:
    numbers = fields.array(spelled, "bytes")
    if not all(isinstance(one, int) and 0 <= one < 256 for one in numbers):
        raise Unreadable("bytes of a token are none")
    return bytes(numbers).decode("utf-8", "replace")
