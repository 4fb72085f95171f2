"""The experiments' tokenizer is written as a new folder."""

from tests.outcome import refused_by_us


def test_k7_a_folder_of_others(run_program, base_folder, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "The dog."}\n' * 10)
    before = (base_folder / "tokenizer.json").read_bytes()
    words = ["script/experiment/tokenizer.py", "--train", tmp_path / "texts.jsonl", "--output"]
    refused_by_us(run_program(*words, base_folder), f"--output: {base_folder} exists")
    assert (base_folder / "tokenizer.json").read_bytes() == before
    assert run_program(*words, tmp_path / "new").status == 0
    assert (tmp_path / "new" / "tokenizer.json").is_file()
