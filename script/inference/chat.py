"""Chat with an extended model, with the template that instruction tuning used.

    cd script/inference && python chat.py                             # the newest run
    python script/inference/chat.py --model_name_or_path MODEL
    printf 'first question\\nsecond question\\n' | python script/inference/chat.py

One turn per line; the conversation is kept until /clear, /exit or the end of input leaves.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.error import exit_on_user_error
from component.generation import (
    describe_context,
    generation_parser,
    load_from_flags,
    prompts,
    recorded_template,
    stream_continuation,
)
from component.template import Turns, encode_conversation


@exit_on_user_error
def main() -> None:
    flags = generation_parser(__doc__).parse_args()
    model, tokenizer = load_from_flags(flags)
    template = recorded_template(tokenizer)
    turns: Turns = []
    for question in prompts("USER: " if sys.stdin.isatty() else ""):
        if question.strip() == "/clear":
            turns.clear()
            continue
        prompt_ids, _ = encode_conversation(tokenizer, [*turns, (question, None)], None, template)
        print("ASSISTANT: ", end="", flush=True)
        answer = stream_continuation(model, tokenizer, prompt_ids, flags)
        turns.append((question, answer))
        used = len(encode_conversation(tokenizer, turns, None, template)[0])
        print(describe_context(model, used), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
