"""What is a token file? `FILE.bin`, a flat array of token ids, and optionally its index, `FILE.bin.json`.

Ids are uint16, or uint32 for vocabularies above 65535. The index holds the documents' offsets, the tokenizer, and
which special tokens surround documents.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from component.data import BOS, EOS
from component.error import UserError, first_line
from component.storage.atomic import atomic_file
from component.tokenizer import describe_tokenizer, tokenizer_hash

LEAST_TOKENS = 16  # of a file whose type is guessed: fewer may have zeros by chance
ZERO_BYTES = 1024  # of zeros are no text: an id of 0 stands for a rare token, or begins a document
INDEX_FORMAT = 1  # increase it with every change of the index


@dataclass
class TokenIndex:
    dtype: str  # uint16 or uint32
    tokens: int
    documents: int
    offsets: list[int]  # of the documents, in tokens, special tokens included
    tokenizer: dict  # name, vocab_size, sha256
    bos: str  # which documents a beginning-of-sequence token precedes
    eos: str  # which documents an end-of-sequence token follows
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
    """The token ids of a `.bin` file, memory-mapped, in the dtype of its index or else of the vocabulary.

    Args:
        field: the flag or key that named `path`, for messages.

    Raises:
        UserError: no such file, a size that is not a multiple of an id's, zeros or another type in place of ids, ids
            beyond the vocabulary, a damaged index.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{field}: there is no file {path}; name a .bin file of token ids")
    index = read_index(path)
    dtype = np.dtype(index.dtype) if index else token_dtype(vocab_size)
    size = file.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise UserError(
            f"{field}: {path} has {size} bytes, not a multiple of a {dtype.name} token id; download or create it again"
        )
    tokens = np.memmap(file, dtype=dtype, mode="r")
    if index is None and (other := _other_type(file, tokens)):
        raise UserError(
            f"{field}: {path} looks like {other}, not like {dtype.name} token ids; convert it to {dtype.name}, or "
            "create it again with script/data/tokenize_bin.py"
        )
    for start in range(0, len(tokens), 2**24):
        part = tokens[start : start + 2**24]
        if (zeros := _zeros_at(part)) is not None:
            raise UserError(
                f"{field}: {path} has only zeros for {ZERO_BYTES} bytes from token {start + zeros} on: padding, or a "
                "download that broke off; download or create it again"
            )
        if int(part.max()) >= vocab_size:
            place = start + int((part >= vocab_size).argmax())
            raise UserError(
                f"{field}: token {place} of {path} is {tokens[place]}, but the model has {vocab_size} tokens; "
                "the file was made with another tokenizer; create it again with this model's"
            )
    return tokens


def _zeros_at(tokens: np.ndarray) -> int | None:
    """Where the first block of ZERO_BYTES zeros begins, in tokens; a short file may be less than a block."""
    size = min(ZERO_BYTES // tokens.itemsize, len(tokens))
    if size < LEAST_TOKENS:
        return None
    blocks = tokens[: len(tokens) // size * size].reshape(-1, size)
    empty = ~blocks.any(axis=1)
    return int(empty.argmax()) * size if empty.any() else None


def _other_type(file: Path, tokens: np.ndarray) -> str | None:
    """What a file without an index looks like, if not like the ids it was read as.

    Ids read in half (a quarter) of their width have zeros in every second (in three of four) places; ids read in
    twice their width exceed every vocabulary.
    """
    with file.open("rb") as stream:
        magic = stream.read(6)
    for start, name in ((b"\x93NUMPY", "a NumPy .npy file"), (b"PK\x03\x04", "a zip archive (.npz, .pt)")):
        if magic.startswith(start):
            return name
    if magic[:1] in (b"{", b"["):
        return "JSON"
    part, width = tokens[: 2**20], 8 * tokens.itemsize
    if len(part) < LEAST_TOKENS:
        return None
    for step in (4, 2):  # the widest first
        places = part[: len(part) // step * step].reshape(-1, step)
        if places[:, 0].any() and not places[:, 1:].any():
            return f"{step * width}-bit integers"
    if width == 32 and int(part.min()) >= 2**16 and len({*part[:LEAST_TOKENS].tolist()}) > 1:
        return "16-bit integers"
    return None


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
                f"{file}: format {values['format']!r}, but this version reads {INDEX_FORMAT}; create it again"
            )
        index = TokenIndex(**{key.name: values[key.name] for key in fields(TokenIndex) if key.name in values})
        _check_shape(index)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{file}: damaged ({type(error).__name__}: {first_line(error)}); create {path} again, or remove its index"
        ) from error
    size, expected = Path(path).stat().st_size, index.tokens * np.dtype(index.dtype).itemsize
    if size != expected:
        raise UserError(
            f"{path} has {size:,} bytes, but its index {file.name} is of {index.tokens:,} {index.dtype} tokens "
            f"({expected:,} bytes); download or create both again"
        )
    return index


def _check_shape(index: TokenIndex) -> None:
    if index.dtype not in ("uint16", "uint32") or index.bos not in BOS or index.eos not in EOS:
        raise ValueError(f"dtype {index.dtype!r}, bos {index.bos!r}, eos {index.eos!r}")
    if not all(type(number) is int for number in (index.tokens, index.documents, *index.offsets)):
        raise TypeError("tokens, documents and offsets must be whole numbers")
    offsets = np.array(index.offsets, dtype=np.int64)
    if len(offsets) != index.documents or (len(offsets) and offsets[0] != 0):
        raise ValueError(f"{len(offsets)} offsets for {index.documents} documents, the first at {index.offsets[:1]}")
    if (np.diff(offsets, append=index.tokens) < 0).any():
        raise ValueError("offsets that decrease, or exceed the number of tokens")
    if not isinstance(index.tokenizer["sha256"], str):
        raise TypeError("tokenizer without a sha256")


def check_tokenizer(index: TokenIndex, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Refuse tokens that another tokenizer made."""
    made_by = index.tokenizer
    if made_by["sha256"] != tokenizer_hash(tokenizer):
        raise UserError(
            f"{path} was made by the tokenizer {made_by.get('name')} ({made_by.get('vocab_size')} tokens), which "
            f"gives other ids than {tokenizer.name_or_path or 'this one'} ({len(tokenizer)} tokens); "
            "create it again with script/data/tokenize_bin.py and this tokenizer"
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
    """Write documents and their index, both atomically, with one document in memory at a time.

    Args:
        documents: token ids without special tokens; `bos` and `eos` say which are added.
        name: of the tokenizer, for messages.

    Raises:
        UserError: the file exists, the tokenizer lacks a requested special token, or there is no document.
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
        described = describe_tokenizer(tokenizer, name)
        origin = (list(sources), command, str(date.today()), versions or {})
        index = TokenIndex(dtype.name, tokens, len(offsets), offsets, described, bos, eos, *origin)
        writing_index.write_text(json.dumps({"format": INDEX_FORMAT, **asdict(index)}) + "\n", encoding="utf-8")
        # the index is renamed first (it is the inner context): a .bin that exists has its own index
        path.unlink(missing_ok=True)
    return index


def _write_ids(file: Path, documents: Iterable[list[int]], dtype: np.dtype) -> tuple[list[int], int]:
    """The documents' offsets, and the number of tokens."""
    offsets, tokens = [], 0
    with file.open("wb") as out:
        for ids in documents:
            offsets.append(tokens)
            np.array(ids, dtype=dtype).tofile(out)
            tokens += len(ids)
    return offsets, tokens


def _specials(tokenizer: PreTrainedTokenizerBase, bos: str, eos: str) -> tuple[list[int], list[int]]:
    """The special tokens before and after a document."""
    found = []
    for flag, value, known, token in (
        ("bos", bos, BOS, tokenizer.bos_token_id),
        ("eos", eos, EOS, tokenizer.eos_token_id),
    ):
        if value not in known:
            raise UserError(f"--{flag}: {value!r} is not one of {', '.join(known)}")
        if value != "none" and token is None:
            raise UserError(f"--{flag}: {value}, but the tokenizer has no such token; use --{flag} none")
        found.append([] if value == "none" else [token])
    return found[0], found[1]
