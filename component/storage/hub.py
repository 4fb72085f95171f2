"""May a name that is no local path be asked of the hub?

Only where it can't be a mistyped path: asking takes half a minute without a network.
"""

import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from component.error import UserError

PART = r"[A-Za-z0-9][\w.-]*"


def check_source(name: str, field: str, what: str = "model folder") -> None:
    """Refuse what is neither a path that exists nor may be a hub id (`owner/name`, or an old one: `gpt2`).

    Args:
        what: is wanted, for the message.
    """
    path = Path(name)
    if path.exists():
        return
    if not re.fullmatch(f"{PART}(/{PART})?", name):
        raise UserError(f"{field}: there is no {what} {name!r}; name one, or a hub id such as owner/name")
    if "/" in name and path.parent.is_dir() and not is_downloaded(name):
        raise UserError(
            f"{field}: there is no {what} {name!r} in the folder {path.parent}; name one, or, for a hub id, "
            f"download it: hf download {name} --local-dir {name}"
        )


def is_downloaded(name: str) -> bool:
    """Whether the hub's local cache has this model or adapter."""
    files = ("config.json", "adapter_config.json", "tokenizer_config.json")
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
