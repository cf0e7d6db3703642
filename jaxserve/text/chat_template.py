"""Chat messages in, prompt text out: a model's Jinja template, rendered in a process of its own.

Rendering follows `transformers.PreTrainedTokenizer.apply_chat_template(tokenize=False)`.
"""

import secrets
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import ChatTemplateError, ChatTemplateLimitError, InvalidRequestError
from jaxserve.text.template_process import RenderTimeoutError, TemplateProcess, WorkerDiedError

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # the first is the one templates read
PART_SEPARATOR = "\n"  # between the text parts of one message


class ChatTemplate:
    """One model's chat template(s). Thread-safe; holds one child process from the first `render` on.

    template          Jinja text; or several by name, of which "tool_use" serves requests with tools and "default" the
                      others; or None, and then every render fails with an explanation
    special_tokens    {"bos_token": text, ...}, visible to the template
    timeout_s         seconds one render may take
    max_output_chars  characters a template may write beyond those of the messages' content
    """

    def __init__(
        self,
        template: str | Mapping[str, str] | None,
        special_tokens: Mapping[str, str],
        *,
        timeout_s: float = 5.0,
        max_output_chars: int = 4 << 20,
    ):
        self._template = template
        self._special_tokens = dict(special_tokens)
        self._timeout_s = timeout_s
        self._max_output_chars = max_output_chars
        self._process = TemplateProcess()
        self.close = weakref.finalize(self, self._process.close)  # also runs at interpreter exit

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the prompt for `messages`.

        add_generation_prompt   end with the header of the assistant's next message
        continue_final_message  leave the last message open, for the model to go on with
        kwargs                  further variables for the template, over the special tokens

        Raises `InvalidRequestError` naming the malformed message, and `ChatTemplateError`: field "messages" where the
        template refused them or, as `ChatTemplateLimitError`, ran past a cap; field "chat_template" where it is missing
        or invalid.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "continue_final_message=True needs add_generation_prompt=False", "continue_final_message", True
            )
        template = self._choose(tools)
        chat = checked_messages(messages)
        mark = "CONTINUE" + secrets.token_hex(16)  # letters and digits pass through any template unchanged
        if continue_final_message:
            chat[-1]["content"] = _final_text(chat) + mark + " "
        context = self._special_tokens | kwargs
        context |= {"messages": chat, "tools": tools, "documents": documents}
        context["add_generation_prompt"] = add_generation_prompt
        limit = self._max_output_chars + sum(len(message.get("content", "")) for message in chat)
        prompt = self._render(template, context, limit)
        return _open_end(prompt, mark) if continue_final_message else prompt

    def _choose(self, tools: list[dict[str, Any]] | None) -> str:
        if self._template is None:
            raise ChatTemplateError(
                "this model has no chat template; pass one (--chat-template FILE, or chat_template=... in Python) "
                "or send a plain prompt instead of messages",
                "chat_template",
            )
        if isinstance(self._template, str):
            return self._template
        name = "tool_use" if tools is not None and "tool_use" in self._template else "default"
        if name not in self._template:
            raise ChatTemplateError(
                f"this model has several chat templates ({', '.join(sorted(self._template))}) and none is the default; "
                "pass the one to use",
                "chat_template",
            )
        return self._template[name]

    def _render(self, template: str, context: dict[str, Any], max_chars: int) -> str:
        try:
            answer = self._process.ask(template, context, max_chars, self._timeout_s)
        except RenderTimeoutError:
            raise ChatTemplateLimitError(f"chat template took longer than {self._timeout_s} s", "messages") from None
        except WorkerDiedError:
            raise ChatTemplateLimitError("chat template ran out of memory or crashed", "messages") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(f"messages or template variables are not JSON: {error}", "messages") from None
        error_kind = answer.get("error")
        if error_kind is None:
            return answer["text"]
        if error_kind == "syntax":
            raise ChatTemplateError(f"chat template is not valid Jinja: {answer['message']}", "chat_template")
        if error_kind == "size":
            raise ChatTemplateLimitError(f"chat template wrote more than {max_chars} characters", "messages")
        if error_kind == "memory":
            raise ChatTemplateLimitError(f"chat template ran out of memory {answer['message']}", "messages")
        raise ChatTemplateError(f"chat template refused the messages: {answer['message']}", "messages")


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copy `messages` as templates of text models expect them: content is one string, fields that are None are gone.

    Accepts content as a string, as a list of {"type": "text", "text": ...} parts (joined by newlines), and None for an
    assistant message with tool calls. Raises `InvalidRequestError` naming the message that is malformed.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequestError("messages must be a non-empty list", "messages", messages)
    return [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked_message(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{field} must be an object, not {type(message).__name__}", field, message)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"{field}.role must be a non-empty string", f"{field}.role", role)
    checked = {key: value for key, value in message.items() if value is not None}
    if "content" in checked:
        checked["content"] = _content_text(checked["content"], f"{field}.content")
    elif role != "assistant" or not checked.get("tool_calls"):
        raise InvalidRequestError(
            f"{field}.content must be text; only an assistant message with tool_calls may have none", f"{field}.content"
        )
    reasoning = next((checked[name] for name in REASONING_FIELDS if name in checked), None)
    if reasoning is not None:  # gpt-oss templates read `thinking`, the others `reasoning_content`
        checked = {"thinking": reasoning, **checked, "reasoning_content": reasoning}
    return checked


def _content_text(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequestError(
            f"{field} must be text or a list of parts, not {type(content).__name__}", field, content
        )
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f'{field}[{i}] must be {{"type": "text", "text": ...}}; this model reads text only, not {kind!r:.80}',
                field,
                part,
            )
        texts.append(part["text"])
    return PART_SEPARATOR.join(texts)


def _final_text(chat: list[dict[str, Any]]) -> str:
    if "content" not in chat[-1]:
        field = f"messages[{len(chat) - 1}].content"
        raise InvalidRequestError(f"continue_final_message=True, but {field} holds no text to continue", field)
    return chat[-1]["content"]


def _open_end(prompt: str, mark: str) -> str:
    """Cut `prompt` where the final message ends. `mark` and a space were appended to that message."""
    before, found, after = prompt.rpartition(mark)
    if not found:
        raise ChatTemplateError(
            "continue_final_message=True, but the chat template leaves out or changes the final message", "messages"
        )
    # Where the space is gone the template trims messages, and it would have trimmed the end of this one.
    prompt = before if after.startswith(" ") else before.rstrip()
    return prompt.replace(mark + " ", "").replace(mark, "")  # from templates that write the message more than once
