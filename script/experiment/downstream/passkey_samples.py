"""What are the training samples for passkey retrieval? The measured kind of prompt, as conversations for train.py.

script/evaluate/passkey.py builds plain prompts from token ids. A chat template that adds no text gives train.py the
same ids; prompts whose text tokenizes differently are skipped.
"""

import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from component.data.chat_template import Turns, encode_by_tokenizer
from component.error import UserError
from component.evaluate.passkey import KEYS, NEEDLE, Prompt, PromptMaker
from component.tokenizer import load_tokenizer

PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
SHORTEST_FILLER = 16  # tokens


def with_plain_template(model: Path, folder: Path) -> Path:
    """A copy of `model` whose chat template only concatenates messages, after <s> if prompts start with it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    tokenizer = load_tokenizer(str(folder))
    has_bos = PromptMaker(tokenizer).start[0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" * has_bos + PLAIN_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def conversation(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Turns:
    """A prompt and its answer as two turns, so that the needle's second mention of the key is trained on too.

    That is the same task over a distance of a few tokens, which small models learn first.
    """
    ids = prompt.ids[prompt.ids[0] == tokenizer.bos_token_id :]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    before, again, after = text.rpartition(f" {prompt.key}")
    return [(before, again), (after, f" {prompt.key}.")]


def training_samples(
    tokenizer: PreTrainedTokenizerBase, tokens: int, longest: int, banned: set[str], seed: int
) -> Iterator[Turns]:
    """Conversations of at least `tokens` tokens in total, each of at most `longest`.

    Raises:
        UserError: `longest` is too short for a prompt, or the tokenizer does not reproduce most prompts from text.
    """
    maker, draw = PromptMaker(tokenizer), random.Random(f"training {seed}")
    drawn = kept = 0
    while tokens > 0:
        key = str(draw.choice(KEYS))
        answer = maker.tokens_of(f" {key}.")
        shortest = len(maker.start + maker.tokens_of(NEEDLE.format(key=key)) + maker.question) + SHORTEST_FILLER
        if shortest > longest - len(answer):
            raise UserError(f"--context: {longest} tokens; the shortest passkey prompt needs {shortest + len(answer)}")
        length = round(math.exp(draw.uniform(math.log(shortest), math.log(longest - len(answer)))))
        prompt = maker.prompt(length, draw.random(), key)
        turns = conversation(tokenizer, prompt)
        drawn += 1
        # filler truncated inside a word may tokenize differently as text: skip such prompts
        if key not in banned and encode_by_tokenizer(tokenizer, turns)[0] == prompt.ids + answer:
            kept, tokens = kept + 1, tokens - length - len(answer)
            yield turns
        if drawn == 100 and kept < drawn / 2:
            raise UserError(
                "--base: its tokenizer does not give the passkey prompts' tokens again from their text; use another"
            )
