"""The form that a model gives to conversations: its chat template, as model files have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent360.mesh.inference.conversation import Message, Prompt, TextPart, Tool


class ChatTemplate:
    """A Jinja template that turns a conversation into the text that a model reads.

    It comes with the model's files, so it is rendered in a sandbox.

    Example:
        >>> template = read_template(Path("models/small"))
        >>> template.render(prompt)
    """

    def __init__(self, source: str, special: dict[str, str]) -> None:
        """Compiles a template.

        Args:
            source: Jinja.
            special: tokens that templates write, such as ``bos_token``.

        Raises:
            ImportError: the extra ``tokenizers`` is not installed.
            jinja2.TemplateError: the template is malformed.
        """
        from jinja2.ext import loopcontrols  # noqa: PLC0415 - an optional dependency
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415 - as above

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _to_json
        self._template = environment.from_string(source)
        self._special = special

    def render(self, prompt: Prompt) -> str:
        """The text that the model reads, up to where its answer begins."""
        return self._template.render(
            messages=[_message(each) for each in prompt.messages],
            tools=[_tool(each) for each in prompt.tools] or None,
            add_generation_prompt=True,
            **self._special,
        )


def read_template(directory: Path) -> ChatTemplate | None:
    """The template in a model's directory; None: there is none.

    Raises:
        ValueError: the files are malformed.
    """
    config_file = directory / "tokenizer_config.json"
    config = json.loads(config_file.read_text("utf-8")) if config_file.exists() else {}
    file = directory / "chat_template.jinja"
    source = file.read_text("utf-8") if file.exists() else config.get("chat_template")
    if isinstance(source, list):  # several by name; this is the one for conversations
        source = next((each["template"] for each in source if each["name"] == "default"), None)
    if not source:
        return None
    special = {
        name: value if isinstance(value, str) else str(value.get("content", ""))
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, str | dict)
    }
    return ChatTemplate(source, special)


def _message(message: Message) -> dict[str, Any]:
    content = message.content
    if message.parts:
        content = "".join(part.text for part in message.parts if isinstance(part, TextPart))
    as_template: dict[str, Any] = {"role": message.role, "content": content}
    if message.name:
        as_template["name"] = message.name
    if message.tool_call_id:
        as_template["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        as_template["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return as_template


def _tool(tool: Tool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters or {},
    }
    return {"type": "function", "function": function}


def _arguments(written: str) -> Any:
    """Arguments of a call as templates want them: an object where they are one."""
    try:
        return json.loads(written)
    except ValueError:
        return written


def _refuse(message: str) -> None:
    """What templates call to refuse a conversation.

    Raises:
        ValueError: always.
    """
    raise ValueError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
