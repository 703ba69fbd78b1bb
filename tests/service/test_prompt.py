"""What each template shows the model for each kind of conversation."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from guard_policies.assessment import Direction
from guard_policies.taxonomy import LLAMA_GUARD_3, Category
from guard_service.chat_templates import ChatTemplateError
from guard_service.conversation import (
    Conversation,
    Image,
    Message,
    Part,
    Role,
    Text,
    ToolCall,
    ToolResult,
)
from guard_service.prompt import (
    IMAGE_TOKEN_ID,
    InvalidConversation,
    PartReport,
    Prompt,
    PromptBuilder,
)
from tests.service.own_tokenizer import own_tokenizer

_TWO = (
    Category("S1", "Violent Crimes", "for people", "Violent Crimes"),
    Category("S2", "Riddles", "Questions that nobody can answer."),
)
_TWO_SHOWN = "S1: Violent Crimes.\nS2: Riddles.\nQuestions that nobody can answer.\n"
_START = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
_ANSWER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
_TASK = (
    "Task: Check if there is unsafe content in '{0}' messages in conversations according our "
    "safety policy with the below categories.\n\n<BEGIN UNSAFE CONTENT CATEGORIES>\n{1}"
    "<END UNSAFE CONTENT CATEGORIES>\n\n<BEGIN CONVERSATION>\n\n"
)
_INSTRUCTIONS = (
    "<END CONVERSATION>\n\nProvide your safety assessment for ONLY THE LAST {0} message in the "
    "above conversation:\n - First line must read 'safe' or 'unsafe'.\n - If unsafe, a second "
    "line must include a comma-separated list of violated categories."
)
_CHAT = Conversation.of(("user", " Which bus? "), ("assistant", "Number 42."))
_TYPED: list[dict[str, object]] = [
    {"role": "user", "content": [{"type": "text", "text": " Which bus? "}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Number 42."}]},
]


def _builder(template: str = "compact", window_tokens: int = 100_000) -> PromptBuilder:
    return PromptBuilder(own_tokenizer(), template, window_tokens)


def _shown(ids: tuple[int, ...]) -> str:
    words = {IMAGE_TOKEN_ID: "<|image|>"}
    pieces, run = [], list[int]()
    for token in ids:
        if token in words:
            pieces += [own_tokenizer().decode(run, skip_special_tokens=False), words[token]]
            run = []
        else:
            run.append(token)
    return "".join([*pieces, own_tokenizer().decode(run, skip_special_tokens=False)])


def _whole(prompt: Prompt) -> str:
    return _shown(prompt.prefix + prompt.body + prompt.closing)


def _body(*messages: Message, template: str = "compact") -> str:
    (prompt,) = _builder(template).build(Conversation(messages), _TWO).prompts
    return _shown(prompt.body)


def _message(role: str, *parts: Part) -> Message:
    return Message(Role(role), parts)


def test_compact_puts_its_instructions_before_the_conversation_and_trims_nothing() -> None:
    (prompt,) = _builder().build(_CHAT, _TWO).prompts
    assert _whole(prompt) == (
        f"{_START}Task: Is the last 'Agent' message of the conversation 'safe' or 'unsafe'? If "
        f"unsafe, list the violated categories.\n\n{_TWO_SHOWN}\n<BEGIN CONVERSATION>\n\n"
        f"User:  Which bus? \n\nAgent: Number 42.\n\n<END CONVERSATION>{_ANSWER}\n\n"
    )
    assert prompt.direction is Direction.RESPONSE
    assert _shown(prompt.body) == "User:  Which bus? \n\nAgent: Number 42.\n\n"
    assert _shown(prompt.closing) == f"<END CONVERSATION>{_ANSWER}\n\n"


def test_the_1b_template_is_the_published_one_and_two_newlines() -> None:
    exact = _builder("llama-guard-3-1b").chat_template(
        _TYPED, {"S1": "Violent Crimes.", "S2": "Riddles.\nQuestions that nobody can answer."}
    )
    assert _shown(exact) == (
        _START
        + _TASK.format("Agent", _TWO_SHOWN)
        + "User: Which bus?\n\nAgent: Number 42.\n\n"
        + _INSTRUCTIONS.format("Agent")
        + f" {_ANSWER}"
    )
    (prompt,) = _builder("llama-guard-3-1b").build(_CHAT, _TWO).prompts
    assert _whole(prompt) == _shown(exact) + "\n\n"


def test_the_8b_template_lists_its_own_categories_and_begins_with_a_space() -> None:
    listed = "".join(f"{item.code}: {item.prompt_name}.\n" for item in LLAMA_GUARD_3)
    (prompt,) = _builder("llama-guard-3-8b").build(Conversation.of(("user", "Hm")), _TWO).prompts
    assert _whole(prompt) == (
        f" {_START}"
        + _TASK.format("User", listed)
        + "User: Hm\n\n"
        + _INSTRUCTIONS.format("User")
        + f"{_ANSWER}\n\n"
    )


def test_the_11b_template_has_one_image_token_before_the_task() -> None:
    conversation = Conversation((_message("user", Text("Look"), Image(b"png")),))
    built = _builder("llama-guard-3-11b-vision").build(conversation, _TWO)
    (prompt,) = built.prompts
    assert _shown(prompt.prefix) == f"{_START}<|image|> " + _TASK.format("User", _TWO_SHOWN)
    assert prompt.prefix.count(IMAGE_TOKEN_ID) == 1
    assert prompt.image == Image(b"png")
    assert built.parts[1] == PartReport(0, 1, "image", True)


def test_a_model_of_fixed_categories_is_not_told_them() -> None:
    (prompt,) = _builder("compact-fixed").build(_CHAT, _TWO).prompts
    assert _shown(prompt.prefix) == (
        f"{_START}Task: Is the last 'Agent' message of the conversation 'safe' or 'unsafe'? If "
        "unsafe, list the violated categories.\n\n<BEGIN CONVERSATION>\n\n"
    )
    assert prompt.categories == tuple(category.code for category in LLAMA_GUARD_3)


def test_prompts_say_which_codes_they_list() -> None:
    assert _builder().build(_CHAT, _TWO).prompts[0].categories == ("S1", "S2")
    assert len(_builder("llama-guard-3-8b").build(_CHAT, _TWO).prompts[0].categories) == 14


def test_llama_stack_writes_role_names_and_the_image_as_a_word() -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Look "}]},
        {"role": "assistant", "content": "A boat."},
    ]
    exact = _builder("llama-stack").chat_template(messages, {"S1": "Violent Crimes."})
    assert _shown(exact) == (
        f"{_START}<|image|>"
        + _TASK.format("Assistant", "S1: Violent Crimes.\n")
        + "System: Be kind.\n\nUser: <image>  Look \n\nAssistant: A boat.\n\n"
        + _INSTRUCTIONS.format("Assistant")
        + f"{_ANSWER}\n\n"
    )


@pytest.mark.parametrize("template", ["llama-guard-3-1b", "llama-guard-3-11b-vision"])
def test_published_hazards_are_kept_on_the_exact_path(template: str) -> None:
    builder = _builder(template)
    lost = builder.chat_template([{"role": "user", "content": "plain string"}])
    assert "plain string" not in _shown(lost)
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": " b "}]
    two = _shown(builder.chat_template([{"role": "user", "content": [*parts, {"type": "image"}]}]))
    assert "User: a\n\nUser: b\n\n<END" in two
    assert two.count("<|image|> Task") == 1
    excluded = _shown(builder.chat_template([], None, ["S2", "S99"]))
    assert "S1: Violent Crimes.\nS3: Sex Crimes.\n" in excluded
    assert "S13: Elections.\n<END" in excluded


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("llama-guard-3-1b", [_TYPED[0], _TYPED[0]]),
        ("llama-guard-3-1b", [_TYPED[1]]),
        ("llama-guard-3-1b", [*_TYPED, {"role": "tool", "content": []}]),
        ("llama-guard-3-8b", [_TYPED[0]]),
        ("llama-guard-3-1b", [{"role": "user", "content": None}]),
        ("llama-stack", []),
        ("llama-stack", [{"role": "user", "content": 7}]),
    ],
)
def test_the_exact_path_raises_where_the_published_template_does(
    template: str, messages: list[dict[str, object]]
) -> None:
    with pytest.raises(ChatTemplateError):
        _builder(template).chat_template(messages)


def test_messages_of_one_role_in_a_row_are_lines_of_one_turn() -> None:
    body = _body(
        _message("user", Text("one"), Text("two")),
        _message("user", Text("three")),
        _message("assistant", Text("four")),
        template="llama-guard-3-1b",
    )
    assert body == "User: one\ntwo\nthree\n\nAgent: four\n\n"


def test_system_and_tool_messages_are_turns_of_the_user() -> None:
    body = _body(
        _message("system", Text("Be kind.")),
        _message("user", Text("Weather?")),
        _message("assistant", ToolCall("weather", '{"place": "Ulm"}'), ToolCall("time", "")),
        _message("tool", ToolResult("rain"), ToolResult("noon")),
    )
    assert body == (
        "User: Be kind.\n\nUser: Weather?\n\n"
        'Agent: weather({"place": "Ulm"})\ntime()\n\nUser: rain\nnoon\n\n'
    )


@pytest.mark.parametrize(
    ("role", "direction"),
    [
        ("user", Direction.PROMPT),
        ("system", Direction.PROMPT),
        ("tool", Direction.PROMPT),
        ("assistant", Direction.RESPONSE),
    ],
)
def test_direction_follows_the_last_role(role: str, direction: Direction) -> None:
    built = _builder().build(Conversation.of(("assistant", "Hm"), (role, "x")), _TWO)
    assert built.direction is direction
    assert built.prompts[0].direction is direction
    named = "Agent" if direction is Direction.RESPONSE else "User"
    assert f"the last '{named}' message" in _shown(built.prompts[0].prefix)


def test_a_direction_may_be_given() -> None:
    built = _builder().build(_CHAT, _TWO, Direction.PROMPT)
    assert built.direction is built.prompts[0].direction is Direction.PROMPT


def test_a_conversation_may_begin_with_the_assistant_and_texts_may_be_empty() -> None:
    assert _body(_message("assistant", Text("Hi")), _message("user", Text(""))) == (
        "Agent: Hi\n\nUser: \n\n"
    )
    assert _body(_message("user")) == "User: \n\n"


def test_a_conversation_without_messages_is_refused() -> None:
    for direction in (None, Direction.PROMPT):
        with pytest.raises(InvalidConversation, match="no messages"):
            _builder().build(Conversation(()), _TWO, direction)


def test_an_image_before_a_text_only_model_is_reported_as_not_judged() -> None:
    messages = (
        _message("user", Image(uri="https://a.example/b.png"), Text("Look"), Image(b"x")),
        _message("assistant", Image(b"y")),
    )
    built = _builder().build(Conversation(messages), _TWO)
    assert _shown(built.prompts[0].body) == "User: Look\n\nAgent: \n\n"
    assert built.parts == (
        PartReport(0, 0, "image", False, "MODEL_IS_TEXT_ONLY"),
        PartReport(0, 1, "text", True),
        PartReport(0, 2, "image", False, "MODEL_IS_TEXT_ONLY"),
        PartReport(1, 0, "image", False, "MODEL_IS_TEXT_ONLY"),
    )


def test_several_images_are_judged_one_by_one() -> None:
    parts = (Image(b"1"), Text("Compare"), Image(b"2"))
    built = _builder("llama-guard-3-11b-vision").build(
        Conversation((_message("user", *parts),)), _TWO
    )
    assert [prompt.image for prompt in built.prompts] == [Image(b"1"), Image(b"2")]
    assert len({prompt.prefix for prompt in built.prompts}) == 1
    assert len(built.windows) == 2


def test_prefixes_are_made_once_for_a_direction_and_a_list_of_categories() -> None:
    builder = _builder()
    first = builder.prefix(Direction.PROMPT, _TWO)
    assert builder.prefix(Direction.PROMPT, list(_TWO)) is first
    assert builder.prefix(Direction.RESPONSE, _TWO) != first
    assert builder.prefix(Direction.PROMPT, _TWO[:1]) != first
    assert builder.build(Conversation.of(("user", "x")), _TWO).prompts[0].prefix is first


def test_a_builder_serves_many_threads() -> None:
    builder = _builder()
    conversations = [Conversation.of(("user", f"kettle {at}" * at)) for at in range(40)]
    expected = [_builder().build(conversation, _TWO) for conversation in conversations]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(lambda it: builder.build(it, _TWO), conversations)) == expected


def test_a_message_of_fifty_tokens_is_built_in_well_under_half_a_millisecond() -> None:
    builder, conversation = _builder(), Conversation.of(("user", "Which bus goes there? " * 10))
    assert builder.build(conversation, LLAMA_GUARD_3).conversation_tokens > 50
    times = []
    for _ in range(50):
        start = time.process_time()
        builder.build(conversation, LLAMA_GUARD_3)
        times.append(time.process_time() - start)
    assert min(times) < 0.0005


def test_builders_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown template 'llama'; known: llama-guard-3-1b"):
        _builder("llama")
    with pytest.raises(ValueError, match="too small"):
        _builder(window_tokens=6)
