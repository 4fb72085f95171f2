"""Which prompts of a file remain to be answered?"""

import json

import pytest

from component.error import UserError
from component.inference.prompt_file import answer_all, count_answered, read_prompts
from tests.words import read_lines, write_lines

ASKED = [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 2}, {"prompt": "ç", "id": 3}]


class TestReading:
    def test_prompts_and_their_lines(self, tmp_path):
        file = write_lines(tmp_path / "in.jsonl", {"prompt": "a", "text": "x"}, {"text": "b"}, {"input": "c"})
        file.write_text(file.read_text() + "\n")
        assert read_prompts(str(file)) == [
            ("a", {"prompt": "a", "text": "x"}),
            ("b", {"text": "b"}),
            ("c", {"input": "c"}),
        ]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"{", "in.jsonl:2: not JSON"),
            (b'{"prompt": "caf\xe9"}', "in.jsonl:2: not JSON in UTF-8"),
            (b'{"question": "a"}', 'in.jsonl:2: no prompt; write {"prompt": "…"}'),
            (b'{"prompt": " "}', "in.jsonl:2: no prompt"),
            (b'{"prompt": 3}', "in.jsonl:2: no prompt"),
            (b"[]", "in.jsonl:2: no prompt"),
            (b'{"prompt": "\\ud800"}', "in.jsonl:2: not valid Unicode"),
        ],
    )
    def test_bad_lines(self, line, message, tmp_path):
        (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
        with pytest.raises(UserError, match=message):
            read_prompts(str(tmp_path / "in.jsonl"))

    def test_no_file(self):
        with pytest.raises(UserError, match="--input_jsonl: there is no file no/such"):
            read_prompts("no/such")


class TestAnswering:
    def answer(self, number: int) -> dict:
        return {"completion": f"answer {number}"}

    def test_from_nothing(self, tmp_path):
        out = tmp_path / "out.jsonl"
        assert count_answered(str(out), ASKED) == 0
        answer_all(str(out), ASKED, 0, self.answer)
        assert read_lines(out) == [{**asked, "completion": f"answer {at}"} for at, asked in enumerate(ASKED)]
        assert "ç" in out.read_text(encoding="utf-8")

    @pytest.mark.parametrize("lost", [1, 9, 30])
    def test_a_killed_run_is_resumed(self, lost, tmp_path):
        complete, cut = tmp_path / "complete.jsonl", tmp_path / "cut.jsonl"
        answer_all(str(complete), ASKED, 0, self.answer)
        cut.write_bytes(complete.read_bytes()[:-lost])
        start = count_answered(str(cut), ASKED)
        assert start == 2
        answer_all(str(cut), ASKED, start, self.answer)
        assert cut.read_bytes() == complete.read_bytes()

    def test_a_finished_run_is_not_changed(self, tmp_path):
        out = tmp_path / "out.jsonl"
        answer_all(str(out), ASKED, 0, self.answer)
        before = out.read_bytes()
        assert count_answered(str(out), ASKED) == 3
        answer_all(str(out), ASKED, 3, self.answer)
        assert out.read_bytes() == before

    @pytest.mark.parametrize(
        "line",
        [
            {"prompt": "other", "id": 1, "completion": "x"},
            {"prompt": "a", "completion": "x"},
            {"prompt": "a", "id": 1},
            [],
            ["completion"],
            5,
        ],
    )
    def test_answers_to_other_prompts_are_not_appended_to(self, line, tmp_path):
        out = tmp_path / "out.jsonl"
        out.write_text(json.dumps(line) + "\n")
        with pytest.raises(UserError, match=r"out.jsonl:1 is not an answer to prompt 1 .*; name another file"):
            count_answered(str(out), ASKED)

    def test_more_answers_than_prompts(self, tmp_path):
        out = tmp_path / "out.jsonl"
        answer_all(str(out), ASKED, 0, self.answer)
        with pytest.raises(UserError, match=r"out.jsonl:3 is not an answer"):
            count_answered(str(out), ASKED[:2])

    @pytest.mark.parametrize("name", ["no/such/out.jsonl", "."])
    def test_nowhere_to_write(self, name, tmp_path):
        with pytest.raises(UserError, match=r"--output_jsonl: .*name a"):
            count_answered(str(tmp_path / name), ASKED)
