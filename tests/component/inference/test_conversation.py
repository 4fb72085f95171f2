"""How does a chat become a prompt, and what do its commands do?"""

import json

import pytest

from component.data.chat_template import encode_chat
from component.data.record import read_chat
from component.error import UserError
from component.inference.conversation import Conversation, is_command, run_command
from component.inference.engine import KnownTokens
from component.storage.claim import locked


@pytest.fixture
def conversation(tokenizer) -> Conversation:
    return Conversation(tokenizer, "vicuna")


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text("The dog sleeps.", encoding="utf-8")
    return tmp_path / "book.txt"


class TestPrompt:
    def test_has_the_template_of_training(self, conversation, tokenizer):
        conversation.add("One?", "Yes.")
        assert conversation.prompt_ids("Two?") == encode_chat(tokenizer, [("One?", "Yes."), ("Two?", None)])[0]

    def test_documents_stand_in_front_of_the_next_question_only(self, conversation, tokenizer, book):
        tokens = len(tokenizer.tokenize("The dog sleeps."))
        message = f"{book}: {tokens} tokens, put in front of the next question"
        assert run_command(f"/file {book}", conversation) == message
        question = "The dog sleeps.\n\nWho?"
        assert conversation.prompt_ids("Who?") == encode_chat(tokenizer, [(question, None)])[0]
        conversation.add("Who?", "The dog.")
        expected = encode_chat(tokenizer, [(question, "The dog."), ("Where?", None)])[0]
        assert conversation.prompt_ids("Where?") == expected

    def test_used_tokens(self, conversation, tokenizer):
        assert conversation.used_tokens() == 0
        conversation.add("One?", "Yes.")
        assert conversation.used_tokens() == len(encode_chat(tokenizer, [("One?", "Yes.")])[0])

    def test_a_tokenizer_that_keeps_ids_gives_the_same(self, tokenizer):
        tokenizer.chat_template = "{% for m in messages %}{{ '<s>' + m.content + '</s>' }}{% endfor %}"
        found = [
            Conversation(known, "tokenizer", turns=[("One?", "Yes.")]).prompt_ids("Two</s>?")
            for known in (tokenizer, KnownTokens(tokenizer, 99))
        ]
        assert found[0] == found[1]
        assert found[0].count(tokenizer.eos_token_id) == 3

    def test_opening_that_all_conversations_share(self, conversation, tokenizer):
        opening = conversation.prompt_ids("Who?")[: conversation.opening_tokens()]
        assert tokenizer.decode(opening).endswith("questions.\nUSER:")


class TestCommands:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("/clear", True),
            (" /file a b.txt", True),
            ("/nonsense", True),
            ("/usr/bin/python is what?", False),
            ("What is /clear?", False),
            ("/", False),
        ],
    )
    def test_is_command(self, line, expected):
        assert is_command(line) is expected

    def test_clear(self, conversation, book):
        conversation.add("One?", "Yes.")
        conversation.add_file(str(book))
        assert run_command("/clear", conversation) == "conversation cleared"
        assert (conversation.turns, conversation.documents) == ([], [])

    def test_training_reads_what_is_saved(self, conversation, tmp_path):
        conversation.add("Größe?", "Ja.")
        conversation.add("Two?", "No.")
        run_command(f"/save {tmp_path / 'a chat.jsonl'}", conversation)
        (line,) = (tmp_path / "a chat.jsonl").read_text(encoding="utf-8").splitlines()
        assert read_chat(json.loads(line)) == ([("Größe?", "Ja."), ("Two?", "No.")], None)

    def test_help_names_every_command(self, conversation):
        commands = [line.split()[0] for line in run_command("/help", conversation).splitlines()]
        assert commands == [
            "/file",
            "/clear",
            "/system",
            "/save",
            "/help",
            "/exit",
        ]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/file", "/file: no file given; use /file PATH"),
            ("/save", "/save: no file given"),
            ("/file no/such.txt", "/file: there is no file no/such.txt"),
            ("/clera", r"/clera is not a command \(did you mean /clear\?\); /help lists them"),
        ],
    )
    def test_mistakes(self, line, message, conversation):
        with pytest.raises(UserError, match=message):
            run_command(line, conversation)

    def test_nothing_to_save(self, conversation, tmp_path):
        with pytest.raises(UserError, match="/save: the conversation is empty"):
            run_command(f"/save {tmp_path / 'chat.json'}", conversation)

    def test_an_existing_file_is_not_overwritten(self, conversation, book):
        conversation.add("One?", "Yes.")
        with pytest.raises(UserError, match=r"book.txt exists; name another"):
            run_command(f"/save {book}", conversation)
        assert book.read_text() == "The dog sleeps."
        with pytest.raises(UserError, match=r"/save: .*chat.json can't be written"):
            run_command(f"/save {book}/chat.json", conversation)
        assert [file.name for file in book.parent.iterdir()] == ["book.txt"], "no lock or temporary file is left"

    @pytest.mark.parametrize("command", ["/save", "/file"])
    def test_what_the_system_refuses_does_not_end_the_chat(self, command, conversation, tmp_path):
        conversation.add("One?", "Yes.")
        with pytest.raises(UserError, match=rf"{command}: .*File name too long; name another file"):
            run_command(f"{command} {tmp_path}/{'x' * 300}", conversation)

    def test_two_chats_do_not_save_to_one_file(self, conversation, tmp_path):
        """K8."""
        conversation.add("One?", "Yes.")
        with locked(tmp_path / "chat.jsonl", "/save"), pytest.raises(UserError, match="another process is writing"):
            run_command(f"/save {tmp_path / 'chat.jsonl'}", conversation)


class TestSystem:
    def test_is_set_and_saved(self, conversation, tokenizer, tmp_path):
        assert run_command("/system  Be brief. ", conversation) == "system prompt set"
        assert conversation.prompt_ids("One?") == encode_chat(tokenizer, [("One?", None)], "Be brief.")[0]
        conversation.add("One?", "Yes.")
        run_command("/clear", conversation)
        conversation.add("Two?", "No.")
        run_command(f"/save {tmp_path / 'chat.jsonl'}", conversation)
        assert read_chat(json.loads((tmp_path / "chat.jsonl").read_text())) == ([("Two?", "No.")], "Be brief.")

    def test_back_to_the_templates(self, conversation, tokenizer):
        run_command("/system Be brief.", conversation)
        assert run_command("/system", conversation) == "system prompt: that of the chat template"
        assert conversation.prompt_ids("One?") == encode_chat(tokenizer, [("One?", None)])[0]

    def test_a_template_without_one(self, tokenizer):
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
            "{% endif %}{{ m.content }}{% endfor %}"
        )
        conversation = Conversation(tokenizer, "tokenizer")
        with pytest.raises(UserError, match=r"rejects a conversation \(System role not supported\)"):
            run_command("/system Be brief.", conversation)
        assert conversation.system is None
        assert conversation.prompt_ids("One?") == tokenizer("One?", add_special_tokens=False).input_ids
