"""How does a folder get its model card? README.md, atomically, and never in place of what a user wrote."""

import os
import shlex
import sys
from pathlib import Path

from component.card.result import results_of
from component.card.text import card_text
from component.checkpoint import CARD_FILE
from component.storage.atomic import atomic_file
from component.storage.generated import is_unchanged, marked


def write_card(folder: Path, name: str | None = None, *, overwrite: bool = False) -> bool:
    """Write the card of an adapter folder or merged folder, with the evaluation results that belong to it.

    Args:
        name: of the model; None for the folder's.
        overwrite: also replace a card that a user wrote or changed.

    Returns:
        Whether it was written: not if there is one that a user wrote or changed, which a line on standard error says.
    """
    file = folder / CARD_FILE
    if is_users(file) and not overwrite:
        say(f"{file} is kept: you wrote or changed it; for a new one: {new_card_command(folder)} --overwrite")
        return False
    results = results_of(folder)
    for outdated in results.outdated:
        say(f"{outdated} is not in the card of {folder}: the weights or the config are newer; measure again")
    with atomic_file(file) as writing:
        writing.write_text(marked(card_text(folder, name or folder.resolve().name, results)), encoding="utf-8")
    return True


def is_users(file: Path) -> bool:
    """Whether there is a card that a user wrote or changed; a link counts, wherever it leads."""
    return os.path.lexists(file) and not is_unchanged(file)


def new_card_command(folder: Path) -> str:
    return f"python script/model_card.py --folder {shlex.quote(str(folder))}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
