"""What does a model read to learn to find pass keys? The prompts that are measured, as conversations for train.py.

script/evaluate/passkey.py measures bare prompts, put together from tokens. A chat template that adds nothing, and two
turns per prompt, make the same tokens out of text; a prompt that would be read in other tokens is not used.
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

END_TO_END = "{% for message in messages %}{{ message.content }}{% endfor %}"
SHORTEST_FILLER = 16  # tokens


def spelling_end_to_end(model: Path, folder: Path) -> Path:
    """A copy of `model` whose chat template puts what is said end to end, behind <s> where prompts have one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    tokenizer = load_tokenizer(str(folder))
    begins = PromptMaker(tokenizer).start[0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" * begins + END_TO_END
    tokenizer.save_pretrained(folder)
    return folder


def conversation(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Turns:
    """A prompt and its answer as two turns: the second time that the needle says the key is learnt too.

    It is the same task at a distance of a few tokens, which small models learn first.
    """
    ids = prompt.ids[prompt.ids[0] == tokenizer.bos_token_id :]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    before, again, after = text.rpartition(f" {prompt.key}")
    return [(before, again), (after, f" {prompt.key}.")]


def training_samples(
    tokenizer: PreTrainedTokenizerBase, tokens: int, longest: int, banned: set[str], seed: int
) -> Iterator[Turns]:
    """Conversations of `tokens` tokens or a few more in all, each of at most `longest`.

    Raises:
        UserError: no room for a prompt, or a tokenizer that reads its text in other tokens than the prompt's own.
    """
    maker, draw = PromptMaker(tokenizer), random.Random(f"training {seed}")
    drawn = kept = 0
    while tokens > 0:
        key = str(draw.choice(KEYS))
        answer = maker.tokens_of(f" {key}.")
        shortest = len(maker.start + maker.tokens_of(NEEDLE.format(key=key)) + maker.question) + SHORTEST_FILLER
        if shortest > longest - len(answer):
            raise UserError(f"--context: {longest} tokens; a pass key and its question take {shortest + len(answer)}")
        length = round(math.exp(draw.uniform(math.log(shortest), math.log(longest - len(answer)))))
        prompt = maker.prompt(length, draw.random(), key)
        turns = conversation(tokenizer, prompt)
        drawn += 1
        # filler that is cut inside a word may be spelt in other tokens as text: such a prompt is drawn again
        if key not in banned and encode_by_tokenizer(tokenizer, turns)[0] == prompt.ids + answer:
            kept, tokens = kept + 1, tokens - length - len(answer)
            yield turns
        if drawn == 100 and kept < drawn / 2:
            raise UserError("--base: its tokenizer reads prompts that are put together from tokens otherwise as text")
