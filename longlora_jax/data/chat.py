"""Messages as the text that a chat model was trained on, for one that is to answer."""

from pathlib import Path

from longlora_jax.data.chat_template import Message, TemplateFault, load_chat_template
from longlora_jax.errors import UserError
from longlora_jax.files import read_json


def has_chat_template(tokenizer_dir: str) -> bool:
    """Whether the folder of a tokenizer has a chat template."""
    config = Path(tokenizer_dir, "tokenizer_config.json")
    written = Path(tokenizer_dir, "chat_template.jinja").is_file()
    return written or config.is_file() and bool(read_json(str(config)).get("chat_template"))


def render_chat(tokenizer_dir: str, messages: list[Message], add_generation_prompt: bool = False) -> str:
    """The text of messages {role, content} under the chat template of a tokenizer's folder, special tokens spelled out.

    add_generation_prompt: up to where the next answer begins. The text has the BOS that the template wants: encode it
    without special tokens, as transformers does. Raises UserError if there is no template, or if it refuses.
    """
    try:
        return load_chat_template(tokenizer_dir).render(messages, add_generation_prompt=add_generation_prompt)
    except TemplateFault as error:
        raise UserError(f"the chat template of {tokenizer_dir} refuses: {error}") from error
