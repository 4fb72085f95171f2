"""How do texts of others become token ids? A special token that somebody wrote in a text, such as </s>, stays text.

Texts without one, nearly all, go to the tokenizer unchanged. For the others there is a copy of it in which the special
tokens have other names, that no text contains: so </s> is three characters for it, and everything else is as before.
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from component.data.template import fill_template
from component.error import UserError

# Unicode's noncharacters, never part of a text; in texts with special tokens, those that are there become U+FFFD
RENAMED, HIDDEN = "\ufdd0", "\ufdd1"


class SpecialTokens:
    """A tokenizer's special tokens: those that it calls so, and those that its template puts around a question."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        frame = _frame(tokenizer)
        named = set(tokenizer.all_special_tokens) | {
            name for name, special in added.items() if special or name in frame
        }
        self.names = sorted(filter(None, named), key=len, reverse=True)  # of two that begin alike, the longer one
        self.pattern = re.compile("|".join(map(re.escape, self.names)) or r"(?!)")
        self._renamed: PreTrainedTokenizerFast | None = None

    def are_in(self, texts: Iterable[str]) -> bool:
        return any(map(self.pattern.search, texts))

    def hide(self, text: str) -> str:
        """`text` in which no special token is left; `rename` brings them back, as text."""
        return self.pattern.sub(lambda found: found[0][0] + HIDDEN + found[0][1:], without_marks(text))

    def rename(self, text: str) -> str:
        """The special tokens of `text` under their names in `renamed`, and hidden ones as they were written."""
        return self.pattern.sub(lambda found: RENAMED + found[0][1:], text).replace(HIDDEN, "")

    def renamed(self, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
        """The tokenizer with other names for its special tokens, of the same length, and the same ids."""
        if not tokenizer.is_fast:
            return partial(tokenizer, split_special_tokens=True)
        if self._renamed is None:  # nothing here refers to the tokenizer, which is a weak key below
            self._renamed = self._rename_all(tokenizer)
        return self._renamed

    def _rename_all(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
        spec = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        names = {name: RENAMED + name[1:] for name in self.names}
        model = spec["model"]
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        if model.get("merges"):
            pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
            model["merges"] = [pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]
        spec["truncation"] = spec["padding"] = None
        backend = Tokenizer.from_str(json.dumps(spec))
        for name, other in names.items():
            assert backend.token_to_id(other) == tokenizer.convert_tokens_to_ids(name), name
        return PreTrainedTokenizerFast(tokenizer_object=backend)


_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple, SpecialTokens]] = WeakKeyDictionary()


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # the web page's, which keeps the ids of texts
        tokenizer = tokenizer.tokenizer
    state = (len(tokenizer), str(tokenizer.chat_template), tokenizer.eos_token)
    found = _known.get(tokenizer)
    if found is None or found[0] != state:
        found = _known[tokenizer] = (state, SpecialTokens(tokenizer))
    return found[1]


def as_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[Any, list[str]]:
    """(tokenizer, texts): what to call in place of `tokenizer` for these texts of others, and with what."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer, texts  # asks here itself
    special = special_tokens(tokenizer)
    if not special.are_in(texts):
        return tokenizer, texts
    return special.renamed(tokenizer), list(map(without_marks, texts))


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text; the tokenizer's own <s> before it only if `add_special_tokens`."""
    call, (text,) = as_text(tokenizer, [text])
    return call(text, add_special_tokens=add_special_tokens).input_ids


def without_marks(text: str) -> str:
    return text.replace(RENAMED, "\ufffd").replace(HIDDEN, "\ufffd")


def _frame(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template puts around a question, where tokens that are not special may mark its end."""
    try:
        return fill_template(tokenizer, [{"role": "user", "content": ""}])
    except UserError:  # no template, or whatever it raises
        return ""
