"""How does a chat become a prompt? Turns, documents for the next question, and commands."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from component.data.chat_template import Turns, as_messages, prompt_ids
from component.data.text import text_ids
from component.error import UserError, nearest
from component.inference.kv_cache import common_prefix
from component.inference.text_file import read_text_file
from component.storage.atomic import atomic_file
from component.storage.claim import claimed

COMMANDS = {
    "/file PATH": "put a text file or a PDF in front of the next question",
    "/clear": "forget the conversation and its documents",
    "/system TEXT": "set the system prompt; without TEXT, back to that of the chat template",
    "/save FILE": "write the conversation as one JSON line for instruction tuning",
    "/help": "list the commands",
    "/exit": "quit, as Ctrl-D does; Ctrl-C stops an answer",
}


@dataclass
class Conversation:
    """Questions and answers in one chat template; `documents` are put in front of the next question.

    `system` is the system prompt; None for that of the template.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    system: str | None = None
    turns: Turns = field(default_factory=list)
    documents: list[str] = field(default_factory=list)

    def prompt_ids(self, question: str) -> list[int]:
        return self._encode([*self.turns, (self._with_documents(question), None)])

    def used_tokens(self) -> int:
        return len(self._encode(self.turns)) if self.turns else 0

    def opening_tokens(self) -> int:
        """Number of leading tokens that all conversations share: system prompt and first role."""
        return common_prefix(self._encode([("a", None)]), self._encode([("1", None)]))

    def characters(self) -> int:
        """Number of characters of all turns, documents and the system prompt."""
        turns = sum(len(user) + len(answer or "") for user, answer in self.turns)
        return turns + sum(map(len, self.documents)) + len(self.system or "")

    def add(self, question: str, answer: str) -> None:
        self.turns.append((self._with_documents(question), answer))
        self.documents.clear()

    def clear(self) -> None:
        self.turns.clear()
        self.documents.clear()

    def add_file(self, path: str) -> int:
        """Put a file's text in front of the next question; returns its number of tokens."""
        text = read_text_file(path, "/file")
        self.documents.append(text)
        return self.tokens_of(text)

    def tokens_of(self, text: str) -> int:
        return len(text_ids(self.tokenizer, text))

    def save(self, path: str) -> None:
        """Write one line of {"messages": …}, a format that instruction tuning reads."""
        if not self.turns:
            raise UserError("/save: the conversation is empty; ask something first")
        file = Path(path).expanduser()
        line = json.dumps({"messages": as_messages(self.turns, self.system)}, ensure_ascii=False) + "\n"
        with claimed({"/save": [file]}, {}), atomic_file(file) as writing:
            writing.write_text(line, encoding="utf-8")

    def set_system(self, text: str | None) -> None:
        """Set the system prompt; None or blank for that of the template.

        Raises:
            UserError: the template takes none; the previous one stays.
        """
        before, self.system = self.system, (text or "").strip() or None
        try:
            self._encode([("a", None)])
        except UserError:
            self.system = before
            raise

    def _with_documents(self, question: str) -> str:
        return "\n\n".join([*self.documents, question])

    def _encode(self, turns: Turns) -> list[int]:
        return prompt_ids(self.tokenizer, turns, self.system, self.template)


def is_command(line: str) -> bool:
    """Whether a line is a command: its first word is a slash and letters, unlike /usr/bin."""
    return re.match(r"/[a-z]+(\s|$)", line.strip()) is not None


def run_command(line: str, conversation: Conversation) -> str:
    """Run a command; returns the message for the user.

    Raises:
        UserError: an unknown command, or a file that cannot be read or written: the conversation goes on.
    """
    name, operand = _parts(line)
    try:
        return _run(name, operand, conversation)
    except OSError as error:  # a full disk, a name that is too long
        raise UserError(f"{name}: {operand}: {error.strerror}; name another file") from error


def _parts(line: str) -> tuple[str, str]:
    name, _, operand = line.strip().partition(" ")
    return name, operand.strip()


def _run(name: str, operand: str, conversation: Conversation) -> str:
    if name == "/clear":
        conversation.clear()
        return "conversation cleared"
    if name == "/help":
        return "\n".join(f"{command:<13} {meaning}" for command, meaning in COMMANDS.items())
    if name in ("/file", "/save") and not operand:
        raise UserError(f"{name}: no file given; use {name} PATH")
    if name == "/file":
        tokens = conversation.add_file(operand)
        return f"{operand}: {tokens} tokens, put in front of the next question"
    if name == "/save":
        conversation.save(operand)
        return f"saved as {operand}"
    if name == "/system":
        conversation.set_system(operand)
        return "system prompt set" if conversation.system else "system prompt: that of the chat template"
    known = [command.split()[0] for command in COMMANDS]
    raise UserError(f"{name} is not a command{nearest(name, known)}; /help lists them")
