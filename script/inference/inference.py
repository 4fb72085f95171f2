"""Continue a text with an extended model, streamed.

    cd script/inference && python inference.py                        # the newest run; prompts typed line by line
    python script/inference/inference.py --prompt_file book.txt --max_new_tokens 200
    cat book.txt | python script/inference/inference.py --model_name_or_path MODEL

Standard input that is not a terminal is one prompt; the text alone goes to standard output.
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
    read_prompt,
    stream_continuation,
)


@exit_on_user_error
def main() -> None:
    parser = generation_parser(__doc__)
    parser.add_argument("--prompt_file", help="a text file to continue")
    flags = parser.parse_args()
    model, tokenizer = load_from_flags(flags)
    text = read_prompt(flags.prompt_file)
    for prompt in prompts("Input: ") if text is None else [text] if text.strip() else []:
        prompt_ids = tokenizer(prompt).input_ids
        print(describe_context(model, len(prompt_ids)), file=sys.stderr, flush=True)
        stream_continuation(model, tokenizer, prompt_ids, flags)


if __name__ == "__main__":
    main()
