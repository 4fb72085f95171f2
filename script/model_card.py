"""Write the model card (README.md) of a merged model or an adapter folder, with the evaluation results beside it.

    python script/model_card.py --folder output/RUN-merged
    python script/model_card.py --folder output/RUN --overwrite

Merging and training write it too; run this after an evaluation, so that the card has its results.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--folder", required=True, help="merged model, or adapter folder of a run")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md that you wrote or changed")
    return parser.parse_args()


from component.card.write import is_users, write_card
from component.checkpoint import CARD_FILE, RECORD_FILE, read_record
from component.error import UserError
from component.storage.claim import make_writable


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    folder = Path(flags.folder)
    if read_record(folder) is None:
        raise UserError(
            f"--folder: {folder} has no {RECORD_FILE}, so it is neither an adapter folder nor a merged model of this "
            "project; name one"
        )
    card = folder / CARD_FILE
    if is_users(card) and not flags.overwrite:
        raise UserError(f"--folder: you wrote or changed {card}; move it away, or replace it with --overwrite")
    make_writable(folder, "--folder", card)
    write_card(folder, overwrite=flags.overwrite)
    print(f"{card}: written")


if __name__ == "__main__":
    main()
