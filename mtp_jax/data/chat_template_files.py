"""Files of a tokenizer that hold its chat template and the texts of its special tokens."""

import os
import re

from etils import epath

from mtp_jax import storage
from mtp_jax.errors import UserError, first_line, short
from mtp_jax.typing import JsonObject

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read(tokenizer: str, template: str) -> tuple[dict[str, str], dict[str, str], str]:
    """Returns the templates by name, the texts of the special tokens by name, and the place of the templates in errors.

    Arguments and errors are those of `ChatTemplate.load`, except that the templates are not compiled.
    """
    folder = None
    if tokenizer != "bytes":
        named = storage.path(os.path.expanduser(tokenizer), "data.tokenizer")
        folder = named if storage.is_dir(named) else named.parent
    config = _read_config(folder, CONFIG_FILE)
    if template:
        where = f"data.chat_template={template}"
        sources = {"default": _read_template(storage.path(os.path.expanduser(template), "data.chat_template"), where)}
    elif folder is not None and storage.is_file(folder / TEMPLATE_FILE):
        where = str(folder / TEMPLATE_FILE)
        sources = {"default": _read_template(folder / TEMPLATE_FILE, where)}
    elif folder is not None and config.get("chat_template"):
        where = f"{folder / CONFIG_FILE}: chat_template"
        sources = _named_templates(config["chat_template"], where)
    else:
        raise UserError(
            f"data.tokenizer={tokenizer}: has no chat template, neither {TEMPLATE_FILE} nor chat_template of "
            f"{CONFIG_FILE} beside it; set data.chat_template to the path of a Jinja template"
        )
    values = _read_config(folder, "special_tokens_map.json") | config
    texts = {name: _token_text(values.get(name)) for name in _SPECIAL_TOKENS}
    special_tokens = {name: text for name, text in texts.items() if text is not None}
    used = re.search(r"\b(bos|eos)_token\b", "".join(sources.values()))
    if used and not values:
        raise UserError(
            f"{where}: uses {used[0]}, which no {CONFIG_FILE} beside data.tokenizer={tokenizer} gives; add that "
            "file, or write the token itself in the template"
        )
    return sources, special_tokens, where


def _read_template(path: epath.Path, where: str) -> str:
    if not storage.is_file(path):
        raise UserError(f"{where}: no such file; give the path of a Jinja template")
    try:
        return storage.read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({first_line(error)}); give a Jinja template in UTF-8") from error


def _read_config(folder: epath.Path | None, name: str) -> JsonObject:
    """Returns a JSON file beside the tokenizer; {} if there is none."""
    if folder is None or not storage.is_file(folder / name):
        return {}
    return storage.read_json(folder / name, "correct or remove it")


def _named_templates(value: object, where: str) -> dict[str, str]:
    """Returns the templates of a tokenizer_config.json by name: a text, or a list of {"name", "template"}."""
    if isinstance(value, str):
        return {"default": value}
    parts = value if isinstance(value, list) else []
    found = {part.get("name"): part.get("template") for part in parts if isinstance(part, dict)}
    if not found or not all(isinstance(text, str) for text in [*found, *found.values()]):
        raise UserError(f"{where}: {short(value)} is not a template or a list of named ones; set data.chat_template")
    return {str(name): str(text) for name, text in found.items()}


def _token_text(value: object) -> str | None:
    """Returns the text of a special token in tokenizer_config.json: a text, or {"content": text, ...}."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
