"""Which prompts of a file remain to be answered?"""

import json
import os
import subprocess
import sys
from typing import ClassVar

import pytest

from component.error import UserError
from component.inference.prompt_file import answer_all, count_answered, held_output, read_prompts, settings_path
from tests.conftest import ROOT
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
            (b'{"prompt": "\\ud800"}', 'in.jsonl:2: "prompt" holds half a character'),
            (b'{"text": "a\\u0000b"}', 'in.jsonl:2: "text" is not text: it has a zero byte at 1; convert it'),
            (b'{"prompt": "a", "completion": "b"}', 'in.jsonl:2: "completion" would be overwritten by that'),  # K9g
            (b'{"text": "a", "prompt_tokens": 1}', 'in.jsonl:2: "prompt_tokens" would be overwritten by that'),
            (b"[" * 100_000, "in.jsonl:2: not JSON"),
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
    def answer(self, numbers: range) -> list[dict]:
        return [{"completion": f"answer {number}"} for number in numbers]

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

    @pytest.mark.parametrize("batch_size", [2, 3, 8])
    def test_in_batches(self, batch_size, tmp_path):
        one, many = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
        answer_all(str(one), ASKED, 0, self.answer)
        answer_all(str(many), ASKED, 0, self.answer, batch_size)
        assert many.read_bytes() == one.read_bytes()

    def test_what_is_no_number_in_json(self, tmp_path):
        """NaN does not equal itself, and true equals 1."""
        asked = [{"prompt": "a", "score": float("nan")}, {"prompt": "b", "is_new": True}]
        out = tmp_path / "out.jsonl"
        answer_all(str(out), asked, 0, self.answer)
        assert count_answered(str(out), asked) == 2
        with pytest.raises(UserError, match=r"out.jsonl:2 is not an answer to prompt 2"):
            count_answered(str(out), [asked[0], {"prompt": "b", "is_new": 1}])


class TestSettings:
    SETTINGS: ClassVar = {"model_name_or_path": "m", "temperature": 0.35, "stop": None, "seed": 42}

    def held(self, out, **changes):
        return held_output(str(out), {"--input_jsonl": [out.parent / "in.jsonl"]}, self.SETTINGS | changes)

    @pytest.fixture
    def out(self, tmp_path):
        with self.held(tmp_path / "out.jsonl"):
            (tmp_path / "out.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        return tmp_path / "out.jsonl"

    def test_are_kept_beside_the_answers(self, out):
        assert json.loads(settings_path(str(out)).read_text()) == {"answers": self.SETTINGS}
        assert sorted(file.name for file in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.settings.json"]
        with self.held(out):
            pass

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"temperature": 0.9}, "were made with --temperature 0.35, not 0.9; use the same settings to go on"),
            ({"stop": ["x"]}, r'were made with --stop null, not \["x"\]; '),
            ({"model_name_or_path": "n"}, 'were made with --model_name_or_path "m", not "n"; '),
            ({"seed": 1, "new": 2}, "were made with --seed 42, --new null, not 1, 2; "),
        ],
    )
    def test_others_are_refused(self, changes, message, out):
        """K9f: answers of two settings were mixed."""
        before = out.read_bytes(), settings_path(str(out)).read_bytes()
        with (
            pytest.raises(UserError, match=f"--output_jsonl: the answers in .*out.jsonl {message}"),
            self.held(out, **changes),
        ):
            raise AssertionError("never begun")
        assert before == (out.read_bytes(), settings_path(str(out)).read_bytes())

    def test_before_the_first_answer_they_may_change(self, out):
        out.write_bytes(b"")
        with self.held(out, seed=1):
            assert json.loads(settings_path(str(out)).read_text())["answers"]["seed"] == 1
        out.unlink()
        with self.held(out, seed=2):
            pass

    def test_answers_without_them_are_continued_with_a_warning(self, out, capsys):
        settings_path(str(out)).unlink()
        with self.held(out):
            assert "out.jsonl.settings.json beside it: whether its answers had the same" in capsys.readouterr().err

    @pytest.mark.parametrize("content", ["{}", "[1]", "x", '{"answers": 3}', "[" * 100_000])
    def test_a_file_of_others_in_their_place_is_kept(self, content, tmp_path):
        """K7: nothing of somebody else is overwritten."""
        settings_path(str(tmp_path / "out.jsonl")).write_text(content)
        with (
            pytest.raises(UserError, match=r"out.jsonl.settings.json exists; name another"),
            self.held(tmp_path / "out.jsonl"),
        ):
            raise AssertionError("never begun")
        assert settings_path(str(tmp_path / "out.jsonl")).read_text() == content

    @pytest.mark.parametrize("link", ["in.jsonl", "./x/../in.jsonl", "hard.jsonl", "soft.jsonl"])
    def test_the_input_is_not_the_output(self, link, tmp_path):
        """K7: the prompts were overwritten by their answers, under another name of the same file."""
        (tmp_path / "x").mkdir()
        (tmp_path / "in.jsonl").write_text("{}\n")
        os.link(tmp_path / "in.jsonl", tmp_path / "hard.jsonl")
        (tmp_path / "soft.jsonl").symlink_to(tmp_path / "in.jsonl")
        read = {"--input_jsonl": [tmp_path / "in.jsonl"]}
        message = "--output_jsonl: .* would be overwritten, but --input_jsonl reads it"
        with pytest.raises(UserError, match=message), held_output(str(tmp_path / link), read, {}):
            raise AssertionError("never begun")

    def test_a_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"--output_jsonl: .* is a folder; name a file"), self.held(tmp_path):
            raise AssertionError("never begun")

    def test_two_programs(self, out):
        """K8: with one output, answers of both were interleaved."""
        code = (
            "import sys; from component.inference.prompt_file import held_output\n"
            "with held_output(sys.argv[1], {}, {}): print('held', flush=True); sys.stdin.read()"
        )
        out.unlink()
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(out)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert other.stdout.readline() == b"held\n"
            message = "--output_jsonl: another process is writing .*out.jsonl; wait for it to end"
            with pytest.raises(UserError, match=message), self.held(out):
                raise AssertionError("never begun")
        finally:
            other.kill()
            other.communicate()
        with self.held(out):
            pass  # the lock of a killed process is gone with it
