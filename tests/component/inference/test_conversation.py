"""What has been said, and which prompt does it become?"""

import json

import pytest

from component.data.chat_template import encode_chat
from component.data.record import read_chat
from component.error import UserError
from component.inference.conversation import Conversation, is_command, run_command


@pytest.fixture
def conversation(tokenizer) -> Conversation:
    return Conversation(tokenizer, "vicuna")


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text("The dog sleeps.", encoding="utf-8")
    return tmp_path / "book.txt"


class TestPrompt:
    def test_is_spelt_as_training_spells(self, conversation, tokenizer):
        conversation.add("One?", "Yes.")
        assert conversation.prompt_ids("Two?") == encode_chat(tokenizer, [("One?", "Yes."), ("Two?", None)])[0]

    def test_documents_stand_in_front_of_the_next_question_only(self, conversation, tokenizer, book):
        tokens = len(tokenizer.tokenize("The dog sleeps."))
        assert run_command(f"/file {book}", conversation) == f"{book}: {tokens} tokens, in front of the next question"
        asked = "The dog sleeps.\n\nWho?"
        assert conversation.prompt_ids("Who?") == encode_chat(tokenizer, [(asked, None)])[0]
        conversation.add("Who?", "The dog.")
        expected = encode_chat(tokenizer, [(asked, "The dog."), ("Where?", None)])[0]
        assert conversation.prompt_ids("Where?") == expected

    def test_used_tokens(self, conversation, tokenizer):
        assert conversation.used_tokens() == 0
        conversation.add("One?", "Yes.")
        assert conversation.used_tokens() == len(encode_chat(tokenizer, [("One?", "Yes.")])[0])

    def test_what_every_conversation_begins_with(self, conversation, tokenizer):
        opening = conversation.prompt_ids("Who?")[: conversation.opening_tokens()]
        assert tokenizer.decode(opening).endswith("questions.\nUSER:")


class TestCommands:
    @pytest.mark.parametrize(
        ("line", "is_one"),
        [
            ("/clear", True),
            (" /file a b.txt", True),
            ("/nonsense", True),
            ("/usr/bin/python is what?", False),
            ("What is /clear?", False),
            ("/", False),
        ],
    )
    def test_what_is_one(self, line, is_one):
        assert is_command(line) is is_one

    def test_clear(self, conversation, book):
        conversation.add("One?", "Yes.")
        conversation.add_file(str(book))
        assert run_command("/clear", conversation) == "the conversation is forgotten"
        assert (conversation.turns, conversation.documents) == ([], [])

    def test_what_is_saved_trains(self, conversation, tmp_path):
        conversation.add("Größe?", "Ja.")
        conversation.add("Two?", "No.")
        run_command(f"/save {tmp_path / 'a chat.jsonl'}", conversation)
        (line,) = (tmp_path / "a chat.jsonl").read_text(encoding="utf-8").splitlines()
        assert read_chat(json.loads(line)) == ([("Größe?", "Ja."), ("Two?", "No.")], None)

    def test_help_names_every_command(self, conversation):
        text = run_command("/help", conversation)
        assert [line.split()[0] for line in text.splitlines()] == ["/file", "/clear", "/save", "/help", "/exit"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/file", "/file: no file named; use /file PATH"),
            ("/save", "/save: no file named"),
            ("/file no/such.txt", "/file: there is no file no/such.txt"),
            ("/clera", r"/clera is no command \(did you mean /clear\?\); /help lists them"),
        ],
    )
    def test_what_is_refused(self, line, message, conversation):
        with pytest.raises(UserError, match=message):
            run_command(line, conversation)

    def test_nothing_to_save(self, conversation, tmp_path):
        with pytest.raises(UserError, match="/save: nothing has been said"):
            run_command(f"/save {tmp_path / 'chat.json'}", conversation)

    def test_what_exists_is_not_overwritten(self, conversation, book):
        conversation.add("One?", "Yes.")
        with pytest.raises(UserError, match=r"book.txt exists; name another"):
            run_command(f"/save {book}", conversation)
        assert book.read_text() == "The dog sleeps."
        with pytest.raises(UserError, match="cannot be written"):
            run_command(f"/save {book}/chat.json", conversation)
