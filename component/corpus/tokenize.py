"""How are texts tokenized for a token file? In chunks, by several processes, in input order."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from component.corpus.pool import in_order
from component.data.source import RecordTally, read_records
from component.data.text import as_text

CHUNK_CHARACTERS = 2**19  # ids are returned as Python integers: at least 8 bytes per token


def documents(
    paths: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    tally: RecordTally,
    *,
    key: str,
    num_proc: int,
    max_documents: int | None = None,
    max_bad_fraction: float = 1.0,
) -> Iterator[list[int]]:
    """Token ids of each text, without special tokens (those written in it stay text); empty texts are skipped.

    Args:
        tally: counts the records.

    Raises:
        UserError: at the end, if too many records were bad.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        call, texts = as_text(tokenizer, texts)
        return call(texts, add_special_tokens=False, return_attention_mask=False).input_ids

    records = (record for path in paths for _, record in tally.good(path, read_records(path, (key,))))
    texts = (record[key] for record in records if record[key].strip())
    with tqdm(desc="tokenizing", unit=" texts", total=max_documents) as bar:
        for _, chunk in in_order(encode, _chunks(islice(texts, max_documents)), num_proc):
            bar.update(len(chunk))
            yield from filter(None, chunk)
    tally.refuse_if_too_many(max_bad_fraction)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
