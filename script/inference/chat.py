"""Chat with an extended model, in the chat template that instruction tuning used.

    cd script/inference && python chat.py                             # the newest run
    python script/inference/chat.py --model_name_or_path MODEL
    printf 'first question\\nsecond question\\n' | python script/inference/chat.py

One question per line. /file PATH puts a text or a PDF in front of the next question, /system TEXT sets the system
prompt, /save FILE writes the conversation, /clear forgets it, /help lists the commands. Ctrl-C stops an answer;
/exit or the end of input quits.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, parsed_first, show
from component.inference.flags import chat_parser


@parsed_first
def parse_flags() -> argparse.Namespace:
    return chat_parser(__doc__).parse_args()


from transformers import PreTrainedModel

from component.error import UserError
from component.inference.context import describe_context, truncate_prompt
from component.inference.conversation import Conversation, is_command, run_command
from component.inference.generate import Stopped, cache_from_flags, stream_generation
from component.inference.kv_cache import PromptCache
from component.inference.load import load_from_flags, new_conversation
from component.inference.terminal import line_editing, prompts


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def take_turn(
    line: str, model: PreTrainedModel, conversation: Conversation, cache: PromptCache, flags: argparse.Namespace
) -> None:
    """Run a command, or answer a question."""
    if is_command(line):
        show(run_command(line, conversation))
        return
    prompt_ids = truncate_prompt(model, conversation.prompt_ids(line), flags, conversation.opening_tokens())
    print("ASSISTANT: ", end="", flush=True)
    try:
        answer = stream_generation(model, conversation.tokenizer, prompt_ids, flags, cache)
    except Stopped as stopped:
        answer = stopped.text
        say("(stopped)")
        if not sys.stdin.isatty():
            raise
    if not answer.strip():  # no turn: a later answer would learn from it to say nothing
        say("(no answer; the question is forgotten, its documents are kept)")
        return
    conversation.add(line, answer)
    say(describe_context(model, conversation.used_tokens(), cache))


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    model, tokenizer = load_from_flags(flags)
    conversation = new_conversation(tokenizer, flags)
    say(f"chat template: {conversation.template}")
    cache = cache_from_flags(model, flags)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        say("/help lists the commands")
    with line_editing():
        for line in prompts("USER: " if is_terminal else ""):
            try:
                take_turn(line, model, conversation, cache, flags)
            except UserError as error:
                if not is_terminal:
                    raise
                show(f"error: {error}")


if __name__ == "__main__":
    main()
