"""Texts of replies, and what only looks like one."""

from __future__ import annotations

import pytest

from guard_middleware.formats.contract import Unreadable
from guard_middleware.formats.fields import tree_pieces
from guard_middleware.testing import FakeGuard
from tests.middleware.formats.openai_chat_speech import OpenAIChatSpeech
from tests.middleware.formats.openai_responses_speech import OpenAIResponsesSpeech
from tests.middleware.formats.speech import Said, Speech
from tests.middleware.test_no_leaks import exchange

SENTENCES = ("Data: 1, 2 and 3", "DATA:", "data:a,b", "Data:\n- base64, images/audio")
IMAGES = (
    "data:image/png;base64,iVBORw0KGgo=",
    "DATA:audio/wav,RIFF",
    " data:;base64,QUJD",
    "data:text/html;charset=utf-8,<b>",
)


@pytest.mark.parametrize("speech", [OpenAIChatSpeech(), OpenAIResponsesSpeech()], ids=str)
@pytest.mark.parametrize("text", SENTENCES)
def test_a_sentence_that_begins_with_data_is_a_text(speech: Speech, text: str) -> None:
    body = speech.whole({Said(0, "content"): text})
    assert exchange(speech, [body], FakeGuard(), streamed=False).body == body


@pytest.mark.parametrize("text", IMAGES)
def test_data_in_a_reply_cannot_be_judged(text: str) -> None:
    with pytest.raises(Unreadable, match="cannot be judged"):
        list(tree_pieces({"image_url": {"url": text}}, 0, "content"))
