"""What is a file of tokens? A flat array of ids, and an index beside it that says what they are.

`FILE.bin` holds token ids and nothing else: uint16, or uint32 for vocabularies above 65535. `FILE.bin.json`, where
there is one, says where each document starts, which tokenizer made the ids, and what stands around documents.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from component.error import UserError, first_line
from component.storage.atomic import atomic_file
from component.tokenizer import describe_tokenizer, tokenizer_hash

INDEX_FORMAT = 1  # raise it with every change of what the index means
BOS, EOS = ("each", "first", "none"), ("each", "none")


@dataclass
class TokenIndex:
    dtype: str  # uint16 or uint32
    tokens: int
    documents: int
    offsets: list[int]  # the token that each document starts at, its beginning token included
    tokenizer: dict  # name, vocab_size, sha256
    bos: str  # which documents a beginning-of-sequence token stands before
    eos: str  # which documents an end-of-sequence token stands after
    sources: list[str] = field(default_factory=list)
    command: str = ""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = INDEX_FORMAT


def index_path(path: str | Path) -> Path:
    return Path(f"{path}.json")


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 65535 else np.uint32)


def read_tokens(path: str, vocab_size: int, field: str = "data_path") -> np.ndarray:
    """The token ids of a `.bin` file, memory-mapped, in its index's type; without one, in that of the vocabulary.

    `field` is what named `path`, for messages.

    Raises:
        UserError: no such file, a size that is no whole number of ids, ids beyond the vocabulary, a damaged index.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{field}: there is no file {path}; name a .bin file of token ids")
    index = read_index(path)
    dtype = np.dtype(index.dtype) if index else token_dtype(vocab_size)
    size = file.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise UserError(
            f"{field}: {path} has {size} bytes, no whole number of {dtype.name} token ids; fetch or make it again"
        )
    tokens = np.memmap(file, dtype=dtype, mode="r")
    for start in range(0, len(tokens), 2**24):
        part = tokens[start : start + 2**24]
        if int(part.max()) >= vocab_size:
            place = start + int((part >= vocab_size).argmax())
            raise UserError(
                f"{field}: token {place} of {path} is {tokens[place]}, but the model has {vocab_size} tokens; "
                "the file belongs to another tokenizer: make one with this model's"
            )
    return tokens


def read_index(path: str | Path) -> TokenIndex | None:
    """The index beside the `.bin` file `path`; None where there is none.

    Raises:
        UserError: a damaged index, one of another format, or one that disagrees with the size of the file.
    """
    file = index_path(path)
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != INDEX_FORMAT:
            raise UserError(
                f"{file}: format {values['format']!r}, but this version reads {INDEX_FORMAT}; make it again"
            )
        index = TokenIndex(**{key.name: values[key.name] for key in fields(TokenIndex) if key.name in values})
        _check_shape(index)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{file}: damaged ({type(error).__name__}: {first_line(error)}); make {path} again, or remove its index"
        ) from error
    size, told = Path(path).stat().st_size, index.tokens * np.dtype(index.dtype).itemsize
    if size != told:
        raise UserError(
            f"{path} has {size:,} bytes, but its index {file.name} tells of {index.tokens:,} {index.dtype} tokens "
            f"({told:,} bytes); fetch or make both again"
        )
    return index


def _check_shape(index: TokenIndex) -> None:
    if index.dtype not in ("uint16", "uint32") or index.bos not in BOS or index.eos not in EOS:
        raise ValueError(f"dtype {index.dtype!r}, bos {index.bos!r}, eos {index.eos!r}")
    offsets = np.array(index.offsets, dtype=np.int64)
    if len(offsets) != index.documents or (len(offsets) and offsets[0] != 0):
        raise ValueError(f"{len(offsets)} offsets for {index.documents} documents, the first at {index.offsets[:1]}")
    if (np.diff(offsets, append=index.tokens) < 0).any():
        raise ValueError("offsets that go back, or beyond the last token")
    if not isinstance(index.tokenizer["sha256"], str):
        raise TypeError("tokenizer without a sha256")


def check_tokenizer(index: TokenIndex, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Refuse tokens that another tokenizer made."""
    made_by = index.tokenizer
    if made_by["sha256"] != tokenizer_hash(tokenizer):
        raise UserError(
            f"{path} was made by the tokenizer {made_by.get('name')} ({made_by.get('vocab_size')} tokens), which "
            f"gives other ids than {tokenizer.name_or_path or 'this one'} ({len(tokenizer)} tokens); "
            "make it again with script/data/tokenize_bin.py and this tokenizer"
        )


def write_tokens(
    path: str | Path,
    documents: Iterable[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    bos: str = "each",
    eos: str = "each",
    sources: Iterable[str] = (),
    command: str = "",
    versions: dict[str, str] | None = None,
    overwrite: bool = False,
) -> TokenIndex:
    """Write documents one after the other, and the index; both whole or not at all, one document in memory at a time.

    Args:
        documents: token ids without any special token around them; `bos` and `eos` say what is put there.
        name: of the tokenizer, for people.

    Raises:
        UserError: the file exists, the tokenizer lacks a token that is asked for, or there is no document.
    """
    path = Path(path)
    before, after = _specials(tokenizer, bos, eos)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; name another file, or --overwrite it")
    dtype = token_dtype(
        max(len(tokenizer), *(token + 1 for token in tokenizer.get_vocab().values()))
    )  # ids may have gaps
    with atomic_file(path) as writing, atomic_file(index_path(path)) as writing_index:
        complete = ([*(before if bos == "each" or at == 0 else []), *ids, *after] for at, ids in enumerate(documents))
        offsets, tokens = _write_ids(writing, complete, dtype)
        if not tokens:
            raise UserError(f"{path}: no document to write; name sources that hold texts")
        told = describe_tokenizer(tokenizer, name)
        origin = (list(sources), command, str(date.today()), versions or {})
        index = TokenIndex(dtype.name, tokens, len(offsets), offsets, told, bos, eos, *origin)
        writing_index.write_text(json.dumps({"format": INDEX_FORMAT, **asdict(index)}) + "\n", encoding="utf-8")
        # the tokens go first and come last (the inner file is renamed first): where they are, so is their own index
        path.unlink(missing_ok=True)
    return index


def _write_ids(file: Path, documents: Iterable[list[int]], dtype: np.dtype) -> tuple[list[int], int]:
    """The token that each document starts at, and how many there are."""
    offsets, tokens = [], 0
    with file.open("wb") as out:
        for ids in documents:
            offsets.append(tokens)
            np.array(ids, dtype=dtype).tofile(out)
            tokens += len(ids)
    return offsets, tokens


def _specials(tokenizer: PreTrainedTokenizerBase, bos: str, eos: str) -> tuple[list[int], list[int]]:
    """What stands before and after documents."""
    found = []
    for flag, value, known, token in (
        ("bos", bos, BOS, tokenizer.bos_token_id),
        ("eos", eos, EOS, tokenizer.eos_token_id),
    ):
        if value not in known:
            raise UserError(f"--{flag}: {value!r} is none of {', '.join(known)}")
        if value != "none" and token is None:
            raise UserError(f"--{flag}: {value}, but the tokenizer has no such token; use --{flag} none")
        found.append([] if value == "none" else [token])
    return found[0], found[1]
