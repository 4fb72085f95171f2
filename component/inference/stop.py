"""Where does an answer end if the user named stop strings? Before the first one, wherever tokens begin or end."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

TAIL_TOKENS = 8  # more tokens than the longest stop string has bytes are decoded, for characters of several tokens


def before_stop(text: str, stops: Sequence[str]) -> str | None:
    """The text before the stop string that is complete first, of several the longest; None if there is none."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else None


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string may begin."""
    longest = min(len(text), max(map(len, stops), default=0))
    return next((size for size in range(longest, 0, -1) if any(s.startswith(text[-size:]) for s in stops)), 0)


class StopWriter:
    """Passes pieces of text on to `write`, but never a part of a stop string."""

    def __init__(self, write: Callable[[str], None], stops: Sequence[str]) -> None:
        self._write, self._stops = write, stops
        self._held, self._is_over = "", False

    def put(self, piece: str, is_last: bool = False) -> None:
        if self._is_over:
            return
        text = self._held + piece
        kept = before_stop(text, self._stops)
        self._is_over = kept is not None
        if kept is None:
            kept = text if is_last else text[: len(text) - held_back(text, self._stops)]
        self._held = text[len(kept) :]
        if kept:
            self._write(kept)


def has_stop(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Sequence[str]) -> bool:
    """Whether the generated `ids` end with a stop string, or with a token that completes one."""
    if not stops:
        return False
    tail = ids[-(max(len(stop.encode()) for stop in stops) + TAIL_TOKENS) :]
    for part in (tail, ids):  # the whole answer is decoded only where its end looks like it
        if before_stop(tokenizer.decode(part, skip_special_tokens=True), stops) is None:
            return False
    return True


def special_stops(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> set[int]:
    """Ids of stop strings that are special tokens, which the text of an answer does not show."""
    known = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {known[stop] for stop in stops if stop in known}
