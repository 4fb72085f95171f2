"""How are many evaluations run in one process, also under the attention that a model was trained with?

    python script/experiment/measure.py TASKS.json

TASKS.json: [{"words": flags of script/evaluate/evaluate.py, "attention": null, "shift_short" or "rolled",
"group_size": tokens}, ...]. `attention` replaces full attention in the evaluation; windows must then be a multiple of
the group size. One process imports the libraries only once.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("tasks", type=Path, help="JSON file of tasks, as above")
    return parser.parse_args()


from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from component.attention.shift_short import shift_short_attention
from component.error import UserError
from script.evaluate import evaluate
from script.shared.rolled_attention import rolled_attention

ATTENTION = {"shift_short": shift_short_attention, "rolled": rolled_attention}


def grouped_forward(attend, group_size: int, module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' attention interface, for windows without padding: (B, H, T, D) -> (B, T, H, D)."""
    if attention_mask is not None or query.shape[2] % group_size:
        raise UserError(
            f"TASKS: windows of {query.shape[2]} tokens; use unpadded multiples of {group_size}, the group size"
        )
    return attend(query, key, value, group_size, scale=scaling), None


@contextmanager
def evaluating_with(name: str | None, group_size: int | None) -> Iterator[None]:
    """Replace "sdpa" by the attention `name` with groups of `group_size` tokens; None changes nothing."""
    if name is not None and group_size is not None:
        AttentionInterface.register("sdpa", partial(grouped_forward, ATTENTION[name], group_size))
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)


@exit_on_user_error
def main() -> None:
    tasks: list[dict[str, Any]] = json.loads(parse_flags().tasks.read_text(encoding="utf-8"))
    for task in tasks:
        sys.argv = ["script/evaluate/evaluate.py", *task["words"]]
        with evaluating_with(task["attention"], task["group_size"]):
            evaluate.main()


if __name__ == "__main__":
    main()
