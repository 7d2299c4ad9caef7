"""The tokens that end a response."""

from typing import Any

from megatron_egrsd.config import DataConfig
from megatron_egrsd.data.prompt_builder import apply_template
from megatron_egrsd.errors import BadArgument


def stop_token_ids(tokenizer: Any, data: DataConfig, stop_tokens: list[str]) -> list[int]:
    """Return the tokens that end a response, in order: the tokenizer's, the chat template's, and `stop_tokens`.

    A base model's tokenizer and configuration name another token than the one its template ends a turn with.

    Raises BadArgument if one of `stop_tokens` is not one token of the tokenizer.
    """
    ids = [tokenizer.eos_token_id, _end_of_turn(tokenizer, data)]
    for text in stop_tokens:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise BadArgument(f"rollout.stop_tokens has {text!r}, which is {len(tokens)} tokens; a stop token is one")
        ids += tokens
    return [token for token in dict.fromkeys(ids) if token is not None]


def _end_of_turn(tokenizer: Any, data: DataConfig) -> int | None:
    """Return the special token that the chat template puts behind what the assistant says, if there is one."""
    said = "42"
    turns = [{"role": "user", "content": "1 + 41?"}, {"role": "assistant", "content": said}]
    try:
        text = apply_template(tokenizer, data, turns, generation_prompt=False)
    except BadArgument:  # a template may refuse a turn of the assistant; prompts have none
        return None
    behind = tokenizer.encode(text.rpartition(said)[2], add_special_tokens=False)
    return behind[0] if behind and behind[0] in tokenizer.get_added_vocab().values() else None
