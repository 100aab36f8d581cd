"""Render two chat templates on a fixed set of conversations: a task of ``guarded``.

The environment is the one that transformers renders in: the same switches, filters and functions,
with a clock that stands still. Reads ``{"pairs": [{"before": [template, tokens], "after": ...}]}``
and writes one line per pair: null where no conversation tells them apart, else what does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import product
from typing import Any

_NOW = datetime(2025, 3, 4, 5, 6, 7)
_SHOWN_CHARACTERS = 40

_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.\nTemperatures are <rounded> & in °C.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
                "days": {"type": ["integer", "null"], "description": "How far ahead"},
                "places": {
                    "type": "array",
                    "items": {"type": "object", "properties": {"lat": {"type": "number"}}},
                },
            },
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
_CLOCK = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the time.",
        "parameters": {"type": "object", "properties": {}},
    },
}
_TOOLS = [_WEATHER, _CLOCK]


def _says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _call(name: str, arguments: Any, number: int = 1) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call0000{number}", "type": "function", "function": function}


_SYSTEM = _says("system", "You are terse.\nAnswer in one word. ")
_ASKED = _says("user", "  What is 2+2? <b>é 漢字 🙂</b>\n")
_TURNS = [_ASKED, _says("assistant", " 4.\n"), _says("user", "And 3+3?")]
_PARIS = {"city": "Paris", "days": 2, "unit": None}
_CALLED = [
    _says("user", "Weather in Paris?"),
    _says("assistant", "", tool_calls=[_call("get_weather", _PARIS)]),
]
_RESULT = _says("tool", '{"sky": "clear"}', name="get_weather", tool_call_id="call00001")
_TWO_CALLS = [_call("get_weather", _PARIS), _call("get_time", {}, 2)]
_LATER = _says("tool", "12:00", name="get_time", tool_call_id="call00002")
_THOUGHT = "Two and two\nmake four."
_REASONED = [
    _ASKED,
    _says("assistant", "4", reasoning_content=_THOUGHT, thinking=_THOUGHT, reasoning=_THOUGHT),
]
_PICTURE = [
    {"type": "text", "text": "What is here? "},
    {"type": "image", "image": "file:///a.png"},
    {"type": "image_url", "image_url": {"url": "file:///a.png"}},
    {"type": "video", "video": "file:///a.mp4"},
]

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "user": ([_ASKED], {}),
    "system and user": ([_SYSTEM, _ASKED], {}),
    "system alone": ([_SYSTEM], {}),
    "several turns": (_TURNS, {}),
    "several turns with a system prompt": ([_SYSTEM, *_TURNS], {}),
    "developer": ([_says("developer", "Be terse."), _ASKED], {}),
    "system prompt in the middle": ([*_TURNS, _SYSTEM], {}),
    "two users": ([_ASKED, _ASKED], {}),
    "assistant first": ([_says("assistant", "Hello."), _ASKED], {}),
    "assistant last": ([_ASKED, _says("assistant", "It is")], {}),
    "unknown role": ([_ASKED, _says("critic", "Wrong.")], {}),
    "empty content": ([_says("system", ""), _says("user", "")], {}),
    "no content": ([_ASKED, _says("assistant", None), _ASKED], {}),
    "content in parts": (
        [
            _says("system", [{"type": "text", "text": "Be terse."}]),
            _says("user", [{"type": "text", "text": "Hello "}, {"type": "text", "text": "you"}]),
            _says("assistant", [{"type": "text", "text": "Hello."}]),
            _says("user", [{"type": "text", "text": "Bye."}]),
        ],
        {},
    ),
    "user in parts": ([_says("user", [{"type": "text", "text": "Hello."}])], {}),
    "eight turns": ([*_TURNS, _says("assistant", "6.")] * 2, {}),
    "pictures": ([_says("user", _PICTURE)], {}),
    "numbered pictures": ([_says("user", _PICTURE)] * 2, {"add_vision_id": True}),
    "sound": ([_says("user", [{"type": "audio", "audio": "file:///a.wav"}])], {}),
    "tools offered": ([_ASKED], {"tools": _TOOLS}),
    "tools offered with a system prompt": ([_SYSTEM, _ASKED], {"tools": _TOOLS}),
    "tools and a system prompt in parts": (
        [_says("system", [{"type": "text", "text": "Be terse."}]), _ASKED],
        {"tools": _TOOLS},
    ),
    "tools offered in the system prompt": (
        [_SYSTEM, _ASKED],
        {"tools": _TOOLS, "tools_in_user_message": False},
    ),
    "tools built in": ([_ASKED], {"builtin_tools": ["browser", "python", "code_interpreter"]}),
    "tool called": (_CALLED, {"tools": _TOOLS}),
    "tool called and answered": ([*_CALLED, _RESULT], {"tools": _TOOLS}),
    "tool called without being offered": ([*_CALLED, _RESULT], {}),
    "tool answered and talked about": (
        [_SYSTEM, *_CALLED, _RESULT, _says("assistant", "Clear."), _says("user", "Thanks.")],
        {"tools": _TOOLS},
    ),
    "two tools called at once": (
        [_ASKED, _says("assistant", "One moment.", tool_calls=_TWO_CALLS), _RESULT, _LATER],
        {"tools": _TOOLS},
    ),
    "two tools called in turn": (
        [
            *[*_CALLED, _RESULT],
            _says("assistant", None, tool_calls=[_call("get_time", {}, 2)]),
            *[_LATER, _says("assistant", "Noon, and clear.")],
        ],
        {"tools": _TOOLS},
    ),
    "arguments as text": (
        [_ASKED, _says("assistant", None, tool_calls=[_call("get_time", '{"a": "é"}')]), _LATER],
        {"tools": _TOOLS},
    ),
    "tool result as an object": ([*_CALLED, _says("tool", {"sky": "clear"})], {"tools": _TOOLS}),
    "tool result in parts": (
        [*_CALLED, _says("tool", [{"type": "text", "text": "clear"}])],
        {"tools": _TOOLS},
    ),
    "tool result as ipython": ([*_CALLED, _says("ipython", "clear")], {"tools": _TOOLS}),
    "tool result as function": ([*_CALLED, _says("function", "clear", name="f")], {}),
    "reasoning in the last turn": (_REASONED, {}),
    "reasoning in an earlier turn": ([*_REASONED, _says("user", "And 3+3?")], {}),
    "reasoning in the text": (
        [_ASKED, _says("assistant", f"<think>\n{_THOUGHT}\n</think>\n\n4"), _says("user", "3+3?")],
        {},
    ),
    "reasoning before a tool call": (
        [
            _ASKED,
            _says(
                "assistant",
                "",
                reasoning_content=_THOUGHT,
                thinking=_THOUGHT,
                tool_calls=[_call("get_weather", _PARIS)],
            ),
            _RESULT,
        ],
        {"tools": _TOOLS},
    ),
    "documents": ([_ASKED], {"documents": [{"title": "Sums", "text": "2+2=4", "doc_id": 1}]}),
    "fixed date": ([_SYSTEM, _ASKED], {"date_string": "26 Jul 2024"}),
    "model identity": (
        [_ASKED],
        {"model_identity": "You are a model.", "reasoning_effort": "high"},
    ),
}
"""Messages and what is passed beside them, by what a reader calls them."""

_THINKING: dict[str, dict[str, Any]] = {
    "": {},
    "thinking on": {"enable_thinking": True, "thinking": True},
    "thinking off": {"enable_thinking": False, "thinking": False},
    "little effort": {"reasoning_effort": "low"},
}


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block that marks what an assistant wrote; it renders as its content."""

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    Generation.tags = {"generation"}

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _NOW.strftime
    return environment


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the variables of each rendering, and its name; the plainest come first."""
    for (mode, thinking), prompt in product(_THINKING.items(), (True, False)):
        for name, (messages, more) in CONVERSATIONS.items():
            details = [
                name,
                *([mode] if mode else []),
                *([] if prompt else ["no prompt to answer"]),
            ]
            yield (
                ", ".join(details),
                {
                    "messages": messages,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": prompt,
                    **more,
                    **thinking,
                },
            )


def compare(before: list[Any], after: list[Any]) -> dict[str, Any] | None:
    """Return the first conversation that tells two templates apart, and where it does."""
    environment = _environment()
    sides = [_compiled(environment, template) for template, _ in (before, after)]
    any_rendered = False
    for name, variables in cases():
        texts = [
            _rendered(template, {**tokens, **variables})
            for template, (_, tokens) in zip(sides, (before, after), strict=True)
        ]
        if texts[0] != texts[1]:
            return {"conversation": name, "texts": _first_difference(*texts)}
        any_rendered = any_rendered or texts[0] is not None
    if any_rendered:
        return None
    return {"conversation": None, "texts": _first_difference(before[0], after[0])}


def _compiled(environment: Any, template: str) -> Any:
    try:
        return environment.from_string(template)
    except Exception:
        return None


def _rendered(template: Any, variables: Mapping[str, Any]) -> str | None:
    """Return the text, or nothing where the template refuses or fails."""
    if template is None:
        return None
    try:
        return str(template.render(**variables))
    except MemoryError:
        raise
    except Exception:
        return None


def _first_difference(before: str | None, after: str | None) -> list[str | None]:
    if before is None or after is None:
        return [text if text is None else text[:_SHOWN_CHARACTERS] for text in (before, after)]
    shorter = min(len(before), len(after))
    at = next((n for n in range(shorter) if before[n] != after[n]), shorter)
    start = max(0, at - _SHOWN_CHARACTERS // 2)
    return [text[start : start + _SHOWN_CHARACTERS] for text in (before, after)]


if __name__ == "__main__":
    for pair in json.load(sys.stdin)["pairs"]:
        sys.stdout.write(json.dumps(compare(pair["before"], pair["after"])) + "\n")
        sys.stdout.flush()
