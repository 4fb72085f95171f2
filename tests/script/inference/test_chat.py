"""chat.py at a terminal and in a pipe: what is printed, and which prompts the model gets."""

import json
import shutil
import time

import pytest

from component.data.chat_template import encode_chat
from tests.terminal import CTRL_C, CTRL_D, UP, Terminal

CHAT = "script/inference/chat.py"
SHORT = ("--do_sample", "false", "--max_new_tokens", "4")


class TestTerminal:
    def test_a_session(self, base_folder, tmp_path):
        """A document, a stopped answer, a mistake, the history, and the saved conversation."""
        (tmp_path / "book.txt").write_text("The quick brown fox.")
        words = ("--model_name_or_path", base_folder, "--context_size", 1024, "--do_sample", "false")
        with Terminal(CHAT, *words, state=tmp_path / "state", seconds_per_token=0.05) as terminal:
            terminal.wait_for("/help lists the commands")
            terminal.wait_for("USER: ")
            terminal.type(f"/file {tmp_path / 'book.txt'}\n")
            assert "tokens, put in front of the next question" in terminal.wait_for("USER: ")
            terminal.type("One?\n")
            terminal.wait_for("ASSISTANT: ")
            while len(terminal.shown) < 10:
                terminal._read()
            terminal.type(CTRL_C)
            shown = terminal.wait_for("USER: ")
            assert "(stopped)" in shown
            assert "of 1024 tokens of context used" in shown
            time.sleep(0.5)  # right after its banner, Python's input() handles Ctrl-C only with the next key
            terminal.type(CTRL_C)
            terminal.wait_for("(/exit or Ctrl-D quits)")
            terminal.wait_for("USER: ")
            terminal.type("/fiel x\n")
            assert "error: /fiel is not a command (did you mean /file?)" in terminal.wait_for("USER: ")
            terminal.type(f"{UP}\n")
            assert "error: /fiel is not a command" in terminal.wait_for("USER: ")
            terminal.type(f"/save {tmp_path / 'chat.json'}\n")
            terminal.wait_for("saved as")
            terminal.wait_for("USER: ")
            terminal.type(CTRL_D)
            assert terminal.status() == 0
        messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
        assert messages[0] == {"role": "user", "content": "The quick brown fox.\n\nOne?"}
        assert len(messages) == 2
        assert messages[1]["content"].strip()
        history = (tmp_path / "state" / "longqlora" / "history").read_text().splitlines()
        assert history[1:3] == ["One?", "/fiel x"]

    def test_exit(self, base_folder, tmp_path):
        with Terminal(CHAT, "--model_name_or_path", base_folder, state=tmp_path) as terminal:
            terminal.wait_for("USER: ")
            terminal.type("/help\n/exit\n")
            terminal.wait_for("/save FILE")
            assert terminal.status() == 0

    def test_after_too_long_a_question_it_continues(self, base_folder, tmp_path):
        with Terminal(CHAT, "--model_name_or_path", base_folder, state=tmp_path) as terminal:
            terminal.wait_for("USER: ")
            terminal.type("dog " * 100 + "\n")
            assert "error: the prompt has" in terminal.wait_for("USER: ")
            terminal.type(CTRL_D)
            assert terminal.status() == 0


class TestPipe:
    def test_one_question_per_line(self, run_program, base_folder, tmp_path):
        """Two questions make a conversation of two turns; a document is put in front of its question."""
        (tmp_path / "book.txt").write_text("The quick brown fox.")
        stdin = f"/file {tmp_path / 'book.txt'}\nOne?\nTwo?\n/save {tmp_path / 'chat.json'}\n".encode()
        outcome = run_program(CHAT, "--model_name_or_path", base_folder, "--context_size", 512, *SHORT, stdin=stdin)
        assert outcome.status == 0, outcome.err
        assert outcome.out.count("ASSISTANT: ") == 2
        assert outcome.err.count("of 512 tokens of context used") == 2
        assert "dynamic cache" in outcome.err
        questions = [turn["content"] for turn in json.loads((tmp_path / "chat.json").read_text())["messages"][::2]]
        assert questions == ["The quick brown fox.\n\nOne?", "Two?"]

    @pytest.mark.parametrize("line", [b"/file no/such.txt\n", b"/clera\n"])
    def test_a_mistake_ends_it(self, line, run_program, base_folder):
        """Later questions may depend on the document."""
        outcome = run_program(CHAT, "--model_name_or_path", base_folder, stdin=line + b"One?\n")
        assert outcome.status == 1
        assert outcome.err.splitlines()[-1].startswith("error: /")
        assert "ASSISTANT" not in outcome.out

    @pytest.mark.parametrize("how", ["middle", "left"])
    def test_truncation(self, how, run_program, base_folder):
        words = ("--model_name_or_path", base_folder, "--context_size", 256, *SHORT)
        outcome = run_program(CHAT, *words, "--truncate", how, stdin=b"dog " * 300)
        assert outcome.status == 0, outcome.err
        assert "tokens cut from the" in outcome.err

    @pytest.mark.parametrize("cache", ["fp8", "int8"])
    def test_size_of_a_quantized_cache(self, cache, run_program, base_folder):
        words = ("--model_name_or_path", base_folder, "--context_size", 512, *SHORT, "--cache_implementation", cache)
        outcome = run_program(CHAT, *words, stdin=b"One?\nTwo?\n")
        assert outcome.status == 0, outcome.err
        assert f", {cache} cache 0." in outcome.err


class TestFlags:
    WORDS = ("--context_size", 512, *SHORT)

    def test_system_prompt(self, run_program, base_folder, prompts_seen, tokenizer):
        words = ("--model_name_or_path", base_folder, *self.WORDS, "--system", "Be brief.")
        assert run_program(CHAT, *words, stdin=b"One?\n").status == 0
        assert prompts_seen == [encode_chat(tokenizer, [("One?", None)], "Be brief.")[0]]

    def test_an_empty_answer_is_no_turn(
        self, run_program, base_folder, prompts_seen, tokenizer, tmp_path, monkeypatch
    ):
        """K21: the model saw its own silence as an example. The document stays in front of the next question."""
        answers = iter(["", "  \n", "Yes."])

        def answer(model, tokenizer, prompt_ids, flags, cache):
            prompts_seen.append(prompt_ids)
            return next(answers)

        monkeypatch.setattr("component.inference.generate.stream_generation", answer)
        (tmp_path / "book.txt").write_text("A fox.")
        stdin = f"/file {tmp_path / 'book.txt'}\nOne?\nTwo?\nThree?\n/save {tmp_path / 'chat.jsonl'}\n".encode()
        outcome = run_program(CHAT, "--model_name_or_path", base_folder, *self.WORDS, stdin=stdin)
        assert outcome.status == 0, outcome.err
        asked = [
            encode_chat(tokenizer, [(f"A fox.\n\n{question}", None)])[0] for question in ("One?", "Two?", "Three?")
        ]
        assert prompts_seen == asked
        assert outcome.err.count("(no answer; the question is forgotten") == 2
        assert len(json.loads((tmp_path / "chat.jsonl").read_text())["messages"]) == 2

    def test_quiet(self, run_program, base_folder):
        words = ("--model_name_or_path", base_folder, *self.WORDS, "--quiet")
        outcome = run_program(CHAT, *words, stdin=b"One?\n")
        assert (outcome.status, outcome.err.strip()) == (0, "")
        assert outcome.out.startswith("ASSISTANT: ")
        outcome = run_program(CHAT, *words, stdin=b"/help\n/clera\n")
        assert outcome.status == 1
        assert outcome.err.startswith("/file PATH")
        assert outcome.err.splitlines()[-1].startswith("error: /clera is not a command")


class TestChat:
    def run(self, run_program, base_folder, stdin: bytes):
        return run_program(CHAT, "--model_name_or_path", base_folder, "--context_size", 512, stdin=stdin)

    def test_the_conversation_is_kept(self, run_program, base_folder, prompts_seen, tokenizer):
        outcome = self.run(run_program, base_folder, b"One?\n\nTwo?\n")
        assert outcome.status == 0
        first, second = prompts_seen
        assert first == encode_chat(tokenizer, [("One?", None)])[0]
        turn, _ = encode_chat(tokenizer, [("One?", "An answer.")])
        assert second[: len(turn)] == turn
        assert second == encode_chat(tokenizer, [("One?", "An answer."), ("Two?", None)])[0]

    def test_until_it_is_cleared(self, run_program, base_folder, prompts_seen, tokenizer):
        self.run(run_program, base_folder, b"One?\n/clear\nTwo?\n")
        assert prompts_seen[1] == encode_chat(tokenizer, [("Two?", None)])[0]

    def test_exit_quits(self, run_program, base_folder, prompts_seen):
        outcome = self.run(run_program, base_folder, b"One?\n/exit\nTwo?\n")
        assert (outcome.status, len(prompts_seen)) == (0, 1)

    def test_chat_has_the_template_of_training(self, run_program, base_folder, prompts_seen, tokenizer):
        """The first prompt equals the unsupervised tokens in front of the answer in a training sample."""
        self.run(run_program, base_folder, "Größe?\n".encode())
        ids, labels = encode_chat(tokenizer, [("Größe?", "So.")])
        assert prompts_seen[0] == [token for token, label in zip(ids, labels, strict=True) if label == -100]

    def test_the_models_own_chat_template(self, run_program, base_folder, prompts_seen, tokenizer, tmp_path):
        """With `template: tokenizer` in its record."""
        folder = shutil.copytree(base_folder, tmp_path / "chatty")
        template = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}"
        (folder / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant> {% endif %}")
        record = {"base_model": "x", "rope_type": "default", "rope_factor": 1.0, "template": "tokenizer", "files": {}}
        (folder / "longqlora.json").write_text(json.dumps(record))
        outcome = run_program(CHAT, "--model_name_or_path", folder, stdin=b"One?\nTwo?\n")
        assert outcome.status == 0, outcome.err
        text = "user> One?\nassistant> An answer.\nuser> Two?\nassistant> "
        assert prompts_seen[1] == tokenizer(text, add_special_tokens=False).input_ids
