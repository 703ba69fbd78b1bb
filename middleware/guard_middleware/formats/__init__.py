"""Backend protocols: each reads requests and replies of one API and knows how to refuse in it."""

from __future__ import annotations

from guard_middleware.formats.bedrock import Bedrock
from guard_middleware.formats.contract import Format
from guard_middleware.formats.llama_cpp import LlamaCpp
from guard_middleware.formats.llama_stack import LLAMA_STACK
from guard_middleware.formats.ollama import OllamaChat, OllamaGenerate
from guard_middleware.formats.openai_chat import OpenAIChat
from guard_middleware.formats.openai_responses import OpenAIResponses
from guard_middleware.formats.openai_text import OpenAIText
from guard_middleware.formats.tgi import Tgi

FORMATS: tuple[Format, ...] = (
    OpenAIChat(),
    OpenAIResponses(),
    OpenAIText(),
    OllamaChat(),
    OllamaGenerate(),
    Bedrock(),
    *LLAMA_STACK,
    Tgi(),
    LlamaCpp(),
)
