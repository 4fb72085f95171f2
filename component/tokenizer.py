"""How is a tokenizer loaded, identified by a hash, and saved?"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from component.error import UserError, naming
from component.storage.foreign import read_object, reading
from component.storage.hub import check_links, check_source, fetch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
CODE_KEYS = ("auto_map", "custom_generate", "processor_class", "auto_class")  # of tokenizer_config.json
UNLIMITED = 10**9  # model_max_length in tokens, for counting texts longer than any model: no warning about them


def load_tokenizer(
    model_name_or_path: str,
    model_max_length: int | None = None,
    field: str = "model_name_or_path",
    cure: str = "fetch the model's tokenizer files into the same folder",
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model; no pad token is added.

    Args:
        field, cure: the flag that named the folder, and what to do if it holds no tokenizer, for messages.

    Raises:
        UserError: no tokenizer there, or one without an end-of-sequence token.
    """
    options: dict[str, Any] = {"padding_side": "right", "truncation_side": "right", "trust_remote_code": False}
    if model_max_length is not None:
        options["model_max_length"] = model_max_length
    check_source(model_name_or_path, field, "folder")
    with naming(field), reading(f"{field}: {model_name_or_path!r} holds no usable tokenizer", cure):
        check_links(model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **options, **_own_files(model_name_or_path))
        for key in CODE_KEYS:  # else saved beside adapters and merged models
            tokenizer.init_kwargs.pop(key, None)
        if not isinstance(tokenizer.chat_template, str | dict | None):
            raise ValueError(f"chat_template: {str(tokenizer.chat_template)[:100]!r} is no template")
        tokenizer.decode(tokenizer("a").input_ids)
        # transformers would warn of "indexing errors" at the first long text; here texts are cut, split or refused
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{field}: the tokenizer of {model_name_or_path!r} has no end-of-sequence token; "
            "give it one (eos_token in tokenizer_config.json)"
        )
    return tokenizer


def _own_files(model_name_or_path: str) -> dict[str, str | None]:
    """The folder's own file in place of each path that tokenizer_config.json names: it may be anywhere on the disk."""
    file = fetch(model_name_or_path, "tokenizer_config.json")
    values = read_object(file) if file else {}
    for name in values.get("fast_tokenizer_files") or ():
        fetch(model_name_or_path, name)  # refuses one outside of the folder
    own = {}
    for key in (key for key, value in values.items() if key.endswith("_file") and isinstance(value, str)):
        found = fetch(model_name_or_path, PurePath(values[key]).name)
        own[key] = str(found) if found else None
    return own


def any_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id for padding; padding is masked by position, so any id will do."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def tokenizer_in(model_name_or_path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None for a folder without one.

    Raises:
        UserError: a tokenizer that cannot be used.
    """
    folder = Path(model_name_or_path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return load_tokenizer(model_name_or_path)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, sources: Iterable[str]) -> None:
    """Save the tokenizer, with sentencepiece's tokenizer.model, which llama.cpp and older programs read.

    Args:
        sources: folders or hub ids of models; tokenizer.model is copied from the first that has it.
    """
    tokenizer.save_pretrained(folder)
    files = (fetch(source, "tokenizer.model") for source in sources)
    found = next((file for file in files if file), None)
    if found and not (folder / found.name).exists():
        shutil.copyfile(found, folder / found.name)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that determines the ids of a text: tokenizers with equal hashes give equal ids.

    Padding, truncation, decoding and post-processing are left out: they change while a tokenizer is used, and a token
    file's index says which special tokens it has.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        decides: dict = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        # transformers' LlamaTokenizer writes "always" and reads it back as "first"; ids are the same, except for texts
        # with a special token in the middle
        decides = json.loads(backend.to_str().replace('"prepend_scheme":"always"', '"prepend_scheme":"first"'))
        for key in ("padding", "truncation", "decoder", "post_processor"):
            decides.pop(key, None)
    specials = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    canonical = json.dumps({**decides, "specials": specials}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> dict:
    return {"name": name, "vocab_size": len(tokenizer), "sha256": tokenizer_hash(tokenizer)}
