"""An instruction corpus: whole lines and counts from sources of several shapes, and shares that are kept."""

import json
from collections import Counter

import pytest
import yaml
from PIL import Image

from component.data.chat_template import encode_chat
from tests.outcome import refused_by_us
from tests.words import read_lines, word_tokenizer, write_lines

PROGRAM = "script/data/build_sft.py"
FRAME = len(encode_chat(word_tokenizer(), [("", "")])[0])  # tokens of the template around a question and an answer


@pytest.fixture
def build(run_program, word_folder, tmp_path):
    def run(*sources: dict, output: str = "out.jsonl", total: int | None = None, **flags):
        config = {"sources": list(sources)} | ({"total": total} if total else {})
        (tmp_path / "sources.yaml").write_text(yaml.safe_dump(config))
        values = {"max_tokens": FRAME + 6, "num_proc": 1, "max_bad_fraction": 0.5} | flags
        options = [word for name, value in values.items() for word in (f"--{name}", value) if word is not True]
        fixed = ["--config", tmp_path / "sources.yaml", "--tokenizer", word_folder, "--output", tmp_path / output]
        return run_program(PROGRAM, *fixed, *options)

    return run


def plain(tmp_path, name: str, *pairs: tuple[str, str], **keys) -> dict:
    file = write_lines(tmp_path / f"{name}.jsonl", *({"input": a, "output": b} for a, b in pairs))
    return {"name": name, "path": str(file), "mapping": "input_output"} | keys


@pytest.fixture
def sources(tmp_path) -> list[dict]:
    one = [("a b", "c"), ("a b", "d"), (" a b ", "c"), ("a b c d e", "a b c"), ("a", " "), ("a", "x spam"), ("a", "b")]
    said = [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]
    talk = [{"conversations": said * 2}, {"conversations": said[:1]}, {"conversations": said}]
    story = [{"plot": {"text": "a c"}, "end": "e"}, {"plot": {"text": "a b"}, "end": "c"}, {"plot": None, "end": "e"}]
    templates = {"input": "{plot.text}", "output": "{end}"}
    filters = {"min_tokens": FRAME + 3, "excludes": "spam"}
    return [
        plain(tmp_path, "plain", *one, filters=filters),
        {"name": "talk", "path": str(write_lines(tmp_path / "talk.jsonl", *talk)), "mapping": "conversations"},
        {"name": "story", "path": str(write_lines(tmp_path / "story.jsonl", *story)), "mapping": templates},
    ]


def test_the_files(build, sources, tmp_path):
    outcome = build(*sources)
    assert outcome.status == 0, outcome.err
    expected = [("a b", "c"), ("a b", "d"), ("b", "c"), ("a c", "e")]
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert sorted(lines) == sorted(f'{{"input": "{a}", "output": "{b}"}}' for a, b in expected)
    stats = json.loads((tmp_path / "out.stats.json").read_text())
    none = dict.fromkeys(("bad", "too_short", "too_long", "empty", "filtered", "duplicates"), 0)
    counts = [{name: source[name] for name in ("read", *none, "available", "sampled")} for source in stats["sources"]]
    first = {
        "read": 7,
        "too_short": 1,
        "too_long": 1,
        "empty": 1,
        "filtered": 1,
        "duplicates": 1,
        "available": 2,
        "sampled": 2,
    }
    assert counts == [
        none | first,
        none | {"read": 3, "bad": 1, "duplicates": 1, "available": 1, "sampled": 1},
        none | {"read": 3, "bad": 1, "duplicates": 1, "available": 1, "sampled": 1},
    ]
    assert stats["counts"] == {name: sum(each[name] for each in counts) for name in counts[0]}
    assert stats["sources"][0]["lengths"]["tokens"] == 2 * (FRAME + 3)
    assert stats["lengths"]["texts"] == 4
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"
    assert sorted(file.name for file in tmp_path.glob("*out*")) == ["out.jsonl", "out.png", "out.stats.json"]
    assert "plain: 2 of 7 read (bad 0, too short 1, too long 1, empty 1, filtered 1, duplicates 1)" in outcome.out
    problem = '"conversations": user; must be user, assistant, ...'
    assert (
        f'2 of 13 lines skipped: {tmp_path}/talk.jsonl:2: {problem}; {tmp_path}/story.jsonl:3: no "plot.text"'
        in outcome.out
    )


def test_training_reads_it(build, sources, tmp_path, own_cache):
    from component.data.dataset import load_samples

    build(*sources)
    samples, report = load_samples(str(tmp_path / "out.jsonl"), word_tokenizer(), FRAME + 6, sft=True)
    assert (report.samples, report.cut, report.dropped) == (4, 0, 0)
    lengths = json.loads((tmp_path / "out.stats.json").read_text())["lengths"]
    assert sum(map(len, samples["input_ids"])) == lengths["tokens"], "tokens as training counts them"


def test_all_turns_of_a_conversation(build, sources, tmp_path):
    assert build(sources[1] | {"turns": "all"}, max_tokens=2 * FRAME).status == 0
    said = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    assert sorted(read_lines(tmp_path / "out.jsonl"), key=str) == sorted(
        [{"messages": said}, {"messages": said * 2}], key=str
    )


def spoken(*said: tuple[str, str]) -> dict:
    return {"conversations": [{"from": name, "value": text} for name, text in said]}


def test_a_system_text_is_kept_or_refused_but_never_dropped(build, tmp_path):
    question = ("Human", "b"), ("bard", "c")
    talk = [spoken(("system", "d"), *question), spoken(*question), spoken(("System", "e"), *question)]
    source = {"name": "talk", "path": str(write_lines(tmp_path / "talk.jsonl", *talk)), "mapping": "conversations"}
    assert build(source | {"turns": "all"}).status == 0
    said = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    systems = [[{"role": "system", "content": text}] for text in "de"]
    expected = [{"messages": [*system, *said]} for system in [[], *systems]]
    assert sorted(read_lines(tmp_path / "out.jsonl"), key=str) == sorted(expected, key=str)

    outcome = build(source, output="first.jsonl", max_bad_fraction=0.9)
    assert read_lines(tmp_path / "first.jsonl") == [{"input": "b", "output": "c"}]
    assert "talk: 1 of 3 read (bad 2," in outcome.out
    refusal = "talk.jsonl:1: its system prompt, 'd', has no field in input and output lines; keep it with turns: all"
    assert refusal in outcome.out


def test_tokens_and_filters_see_the_system_text(build, tmp_path, own_cache):
    from component.data.dataset import load_samples

    question = ("prompter", "b"), ("bot", "c")
    talk = [spoken(("system", "a b c d e"), *question), spoken(("system", "spam"), *question)]
    source = {"name": "talk", "path": str(write_lines(tmp_path / "talk.jsonl", *talk)), "mapping": "conversations"}
    assert build(source | {"turns": "all", "filters": {"excludes": "spam"}}).status == 0
    stats = json.loads((tmp_path / "out.stats.json").read_text())
    assert stats["counts"]["filtered"] == 1
    samples, _ = load_samples(str(tmp_path / "out.jsonl"), word_tokenizer(), FRAME + 6, sft=True)
    assert [len(ids) for ids in samples["input_ids"]] == [stats["lengths"]["tokens"]] == [10]


def numbered(tmp_path, name: str, number_of: int, **keys) -> dict:
    return plain(tmp_path, name, *((f"{name} {number}", "b") for number in range(number_of)), **keys)


def taken(file) -> Counter:
    return Counter(record["input"].split()[0] for record in read_lines(file))


def test_shares_counts_and_total(build, tmp_path):
    x, y, z = (numbered(tmp_path, name, count) for name, count in (("x", 90), ("y", 300), ("z", 50)))
    outcome = build(x | {"share": 1}, y | {"share": 2}, z | {"count": 60})
    assert taken(tmp_path / "out.jsonl") == {"x": 90, "y": 180, "z": 50}
    assert (
        "z: 50 of 50 read (bad 0, too short 0, too long 0, empty 0, filtered 0, duplicates 0; 60 asked for)"
        in outcome.out
    )
    build(x | {"share": 1}, y | {"share": 2}, z | {"count": 20}, total=50, output="total.jsonl")
    assert taken(tmp_path / "total.jsonl") == {"x": 10, "y": 20, "z": 20}


def test_the_same_bytes_from_any_number_of_processes(build, tmp_path):
    mixed = [numbered(tmp_path, "x", 700, share=1), numbered(tmp_path, "y", 600, count=200)]
    for output, flags in (("1.jsonl", {}), ("2.jsonl", {"num_proc": 2}), ("3.jsonl", {"seed": 1})):
        build(*mixed, output=output, total=300, **flags)
    one, two, other = ((tmp_path / f"{number}.jsonl").read_bytes() for number in (1, 2, 3))
    assert one == two
    assert one != other
    names = [record["input"].split()[0] for record in read_lines(tmp_path / "1.jsonl")]
    assert 0.4 < names[:150].count("x") / names.count("x") < 0.6, "shuffled"


def test_going_on_and_other_settings(build, sources, tmp_path, monkeypatch):
    build(*sources, output="whole.jsonl")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("component.corpus.sft.write_examples", killed)
        assert build(*sources).status == 130
    refused_by_us(build(*sources, max_tokens=99), "max_tokens", "now 99", "--overwrite")
    outcome = build(*sources)
    assert "resuming an interrupted run after 13 texts" in outcome.out
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_is_refused(build, run_program, sources, tmp_path):
    refused_by_us(
        build(sources[0] | {"mapping": "alpacca"}),
        "sources.yaml",
        "mapping: 'alpacca' is not a preset (did you mean alpaca?)",
    )
    refused_by_us(build(*sources, max_tokens=0, num_proc=0), "--max_tokens: 0", "--num_proc: 0")
    refused_by_us(build(*sources, max_bad_fraction=0.1), "2 of 13 lines can't be used", "talk.jsonl:2: ")
    nothing = {"share": 1, "count": None, "filters": {"contains": "nowhere in it"}, "name": "lost"}
    refused_by_us(build(*sources, sources[0] | nothing, output="2.jsonl"), "--config: lost: nothing in it fits")
    refused_by_us(build(*sources, output="2.jsonl", max_tokens=5), "no example of", "raise --max_tokens")
    nested = write_lines(tmp_path / "nested.jsonl", {"question_text": "a", "document_text": "b", "annotations": [5]})
    odd = {"name": "odd", "path": str(nested), "mapping": "natural_questions"}
    refused_by_us(
        build(odd, output="3.jsonl"), "nested.jsonl:1: does not match mapping natural_questions (AttributeError"
    )
    (tmp_path / "out.jsonl").write_text("mine")
    refused_by_us(build(*sources), "out.jsonl exists", "--overwrite")
    assert (tmp_path / "out.jsonl").read_text() == "mine", "although an unfinished run of that name is there"


def test_lengths_are_counted_as_training_will_spell_chats(build, word_folder, tmp_path):
    spelling = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (word_folder / "chat_template.jinja").write_text(spelling)
    try:
        source = plain(tmp_path, "plain", ("a b", "c"), ("a b c", "d"))
        outcome = build(source, template="tokenizer", max_tokens=3)
    finally:
        (word_folder / "chat_template.jinja").unlink()
    assert outcome.status == 0, outcome.err
    assert read_lines(tmp_path / "out.jsonl") == [{"input": "a b", "output": "c"}]
    assert "no chat template" in build(source, template="tokenizer", overwrite=True).err
