"""A Hugging Face model directory in; its backend tokenizer, special tokens and chat templates out."""

import json
import logging
from pathlib import Path
from typing import Any

import tokenizers

from jaxserve.errors import CorruptFileError, ModelNotFoundError, UnsupportedModelError

logger = logging.getLogger(__name__)

ChatTemplates = str | dict[str, str] | None

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OTHER_FILES = (  # tokenizers transformers can convert
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)


def read_directory(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, str], ChatTemplates]:
    """Read what `transformers` would, without importing it unless there is no `tokenizer.json`.

    Returns the backend tokenizer, {"bos_token": text, ...}, and the chat template(s). Raises `ModelNotFoundError`,
    `CorruptFileError` or `UnsupportedModelError`.
    """
    if not directory.is_dir():
        raise ModelNotFoundError(f"no model directory {directory}")
    path = directory / "tokenizer.json"
    if not path.is_file():
        return _through_transformers(directory)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for malformed files
        raise CorruptFileError(f"{path} is not a tokenizer: {_one_line(error)}") from None
    config = _read_object(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # newer checkpoints; the older files are then only kept for old readers
        config |= _read_object(directory / "special_tokens_map.json")
    special_tokens = _special_tokens(config, directory)
    _add_tokens(backend, config.get("added_tokens_decoder", {}), special_tokens, directory)
    return backend, special_tokens, _chat_templates(directory, config)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not JSON: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _special_tokens(config: dict[str, Any], directory: Path) -> dict[str, str]:
    found = {}
    extra = config.get("extra_special_tokens")
    named = {**config, **extra} if isinstance(extra, dict) else config
    for name, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name in SPECIAL_NAMES and value is not None and not isinstance(text, str):
            raise CorruptFileError(f"{directory}: special token {name} must be text, not {value!r:.80}")
        if isinstance(text, str) and (name.endswith("_token") or (isinstance(extra, dict) and name in extra)):
            found[name] = text
    return found


def _add_tokens(backend: tokenizers.Tokenizer, listed: Any, special_tokens: dict[str, str], directory: Path) -> None:
    """Add the tokens that `tokenizer_config.json` lists beyond `tokenizer.json`, and mark the special ones."""
    present = {info.content for info in backend.get_added_tokens_decoder().values()}
    try:
        tokens = sorted((int(key), tokenizers.AddedToken(**value)) for key, value in listed.items())
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{directory / 'tokenizer_config.json'}: malformed added_tokens_decoder: {_one_line(error)}"
        ) from None
    missing = {info.content: token for token, info in tokens if info.content not in present}
    backend.add_tokens([info for _, info in tokens if info.content in missing])  # at once: each call costs a rebuild
    for text, token in missing.items():
        if backend.token_to_id(text) != token:
            raise CorruptFileError(
                f"{directory}: tokenizer_config.json gives {text!r} the id {token}, "
                f"tokenizer.json leads to {backend.token_to_id(text)}"
            )
    unmarked = [text for text in special_tokens.values() if text not in present | missing.keys()]
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(text, special=True, normalized=False)
            for text in unmarked
            if backend.token_to_id(text) is not None
        ]
    )


def _chat_templates(directory: Path, config: dict[str, Any]) -> ChatTemplates:
    """Files of their own come before `tokenizer_config.json`, as in `transformers`."""
    named = {}
    if (directory / "chat_template.jinja").is_file():
        named["default"] = _read_text(directory / "chat_template.jinja")
    elif (directory / "chat_template.json").is_file():
        template = _read_object(directory / "chat_template.json").get("chat_template")
        if not isinstance(template, str):
            raise CorruptFileError(f"{directory / 'chat_template.json'} holds no text 'chat_template'")
        named["default"] = template
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        named[path.stem] = _read_text(path)
    if not named:
        return _config_templates(config.get("chat_template"), directory)
    return named["default"] if list(named) == ["default"] else named


def _config_templates(template: Any, directory: Path) -> ChatTemplates:
    if template is None or isinstance(template, str):
        return template
    try:
        named = {entry["name"]: entry["template"] for entry in template}
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(text, str) for text in (*named, *named.values())):
        raise CorruptFileError(f"{directory / 'tokenizer_config.json'}: malformed chat_template {template!r:.80}")
    return named


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise CorruptFileError(f"{path} is not UTF-8: {_one_line(error)}") from None


def _through_transformers(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, str], ChatTemplates]:
    other = next((name for name in OTHER_FILES if (directory / name).is_file()), None)
    if other is None:
        raise ModelNotFoundError(
            f"{directory} holds no tokenizer; looked for {', '.join(('tokenizer.json', *OTHER_FILES))}"
        )
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _read_object(directory / name)  # malformed files are then reported by name
    logger.info("%s holds no tokenizer.json: converting %s through transformers.AutoTokenizer", directory, other)
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # conversions fail in as many ways as there are formats
        raise UnsupportedModelError(f"{directory}: transformers cannot read {other}: {_one_line(error)}") from error
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise UnsupportedModelError(f"{directory}: {type(converted).__name__} of {other} has no tokenizers backend")
    templates = _chat_templates(directory, _read_object(directory / "tokenizer_config.json"))
    return backend, dict(converted.special_tokens_map), templates


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
