"""Every format's speech; a new format adds its own."""

from __future__ import annotations

from tests.middleware.formats.bedrock_speech import BedrockSpeech
from tests.middleware.formats.llama_cpp_speech import LlamaCppInfillSpeech, LlamaCppSpeech
from tests.middleware.formats.llama_stack_speech import (
    LlamaStackChatSpeech,
    LlamaStackCompletionSpeech,
)
from tests.middleware.formats.ollama_speech import OllamaChatSpeech, OllamaGenerateSpeech
from tests.middleware.formats.openai_chat_speech import OpenAIChatSpeech
from tests.middleware.formats.openai_responses_speech import OpenAIResponsesSpeech
from tests.middleware.formats.openai_text_speech import OpenAITextSpeech
from tests.middleware.formats.speech import Speech
from tests.middleware.formats.tgi_speech import TgiListSpeech, TgiSpeech

SPEECHES: tuple[Speech, ...] = (
    OpenAIChatSpeech(),
    OpenAIResponsesSpeech(),
    OpenAITextSpeech(),
    OllamaChatSpeech(),
    OllamaGenerateSpeech(),
    BedrockSpeech(),
    LlamaStackChatSpeech(),
    LlamaStackCompletionSpeech(),
    TgiSpeech(),
    TgiListSpeech(),
    LlamaCppSpeech(),
    LlamaCppInfillSpeech(),
)
