"""What is mixed, in which shares? All that is wrong with a YAML at once, and shares that are kept exactly."""

from pathlib import Path

import pytest
import yaml

from component.corpus.mixture import MixtureSource, apportion, read_mixture
from component.error import UserError
from tests.conftest import ROOT
from tests.words import write_lines


@pytest.fixture
def config(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"input": "a", "output": "b"})

    def write(*sources: object, **top) -> Path:
        file = tmp_path / "sources.yaml"
        file.write_text(yaml.safe_dump({"sources": list(sources)} | top))
        return file

    return write


def source(tmp_path, **changes) -> dict:
    return {"name": "one", "path": str(tmp_path / "a.jsonl"), "mapping": "input_output"} | changes


def test_a_right_one(config, tmp_path):
    filters = {"min_tokens": 5, "max_tokens": 50, "contains": "a+", "excludes": "b"}
    two = source(
        tmp_path, name="two", mapping={"input": "{a}", "output": "{b}"}, share=0.5, turns="all", filters=filters
    )
    mixture = read_mixture(config(source(tmp_path, count=3), two, total=10))
    assert mixture.total == 10
    assert [each.files for each in mixture.sources] == [[tmp_path / "a.jsonl"]] * 2
    assert (mixture.sources[0].count, mixture.sources[0].share) == (3, None)
    assert mixture.sources[1].filters == filters


def test_everything_wrong_is_told_at_once(config, tmp_path):
    wrong = source(
        tmp_path, path=str(tmp_path / "none.jsonl"), mapping="bocksum", shares=1, share=0, count=True, turns="some"
    )
    wrong["filters"] = {"min_token": 1, "max_tokens": -1, "contains": "("}
    templates = source(tmp_path, mapping={"input": "{a", "ouput": "b"}, share=1, count=2, filters=["x"])
    with pytest.raises(UserError) as refusal:
        read_mixture(config(wrong, templates, "text", {}, {"name": 5}, total=0, sourcs=1))
    assert str(refusal.value).splitlines() == [
        f"{tmp_path}/sources.yaml:",
        "  unknown key 'sourcs' (did you mean sources?); known: sources, total",
        "  total: 0; use a whole number of at least 1",
        "  sources[0] (one): unknown key 'shares' (did you mean share?); known: "
        "name, path, mapping, share, count, turns, filters",
        "  sources[0] (one): share and count exclude each other; remove one",
        "  sources[0] (one): share: 0; use a number above 0",
        "  sources[0] (one): count: True; use a whole number of at least 1",
        "  sources[0] (one): mapping: 'bocksum' is not a preset (did you mean booksum?): input_output, alpaca, "
        "evol_instruct, booksum, conversations, messages, natural_questions",
        "  sources[0] (one): filters: unknown key 'min_token' (did you mean min_tokens?); "
        "known: min_tokens, max_tokens, contains, excludes",
        "  sources[0] (one): filters: max_tokens: -1; use a whole number of at least 1",
        "  sources[0] (one): filters: contains: '(' is not a regular expression "
        "(missing ), unterminated subpattern at position 0)",
        "  sources[0] (one): turns: 'some' is not one of first, all",
        f"  sources[0] (one): path: there is no file or folder {tmp_path}/none.jsonl; "
        "name one, or owner/dataset/file.jsonl on the hub",
        "  sources[1] (one): share and count exclude each other; remove one",
        "  sources[1] (one): mapping: unknown key 'ouput' (did you mean output?); known: input, output",
        "  sources[1] (one): mapping: input: '{a': expected '}' before end of string; write {{ for a brace",
        "  sources[1] (one): mapping: output: is missing",
        "  sources[1] (one): filters: ['x']; use min_tokens, max_tokens, contains, excludes",
        "  sources[2]: 'text' is not a mapping with keys (name, path, mapping, share, count, turns, filters)",
        "  sources[3]: name is missing",
        "  sources[3]: path is missing",
        "  sources[3]: mapping is missing",
        "  sources[4] (5): path is missing",
        "  sources[4] (5): mapping is missing",
        "  sources[4] (5): name: 5 is not a string",
    ]  # fmt: skip


def test_no_end_and_no_room(config, tmp_path):
    endless = source(tmp_path, share=float("inf"), filters={"min_tokens": 6, "max_tokens": 5})
    with pytest.raises(UserError) as refusal:
        read_mixture(config(endless))
    assert "share: inf; use a number above 0" in str(refusal.value)
    assert "filters: min_tokens 6 is above max_tokens 5" in str(refusal.value)


def test_two_of_one_name(config, tmp_path):
    with pytest.raises(UserError, match="name: 'one' is used twice; give each source its own"):
        read_mixture(config(source(tmp_path), source(tmp_path)))


def test_a_total_of_nothing(config, tmp_path):
    with pytest.raises(UserError, match="total: no source has a share that it could limit"):
        read_mixture(config(source(tmp_path), total=5))


@pytest.mark.parametrize("content", ["", "sources: []", "[1]", "sources: {a: 1}"])
def test_no_sources(tmp_path, content):
    (tmp_path / "sources.yaml").write_text(content)
    with pytest.raises(UserError, match="needs `sources:`, a list of name, path, mapping"):
        read_mixture(tmp_path / "sources.yaml")


@pytest.mark.parametrize("content", [b"a: [", b"\xff", None])
def test_no_yaml(tmp_path, content):
    if content:
        (tmp_path / "sources.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"--config: .*sources.yaml can't be read: "):
        read_mixture(tmp_path / "sources.yaml")


def test_the_shipped_example_is_right(monkeypatch):
    monkeypatch.setattr("component.corpus.mixture.resolve_files", lambda path, field: [Path(path)])
    mixture = read_mixture(ROOT / "script" / "data" / "sft_sources.yaml")
    assert [each.share or each.count for each in mixture.sources] == [2, 2, 1, 3, 5000]


@pytest.mark.parametrize(
    ("wanted", "total", "available", "taken"),
    [
        ([{}, {}], None, [5, 7], [5, 7]),
        ([{"count": 3}, {"count": 9}], None, [5, 7], [3, 7]),
        ([{"share": 1}, {"share": 2}], None, [100, 100], [50, 100]),
        ([{"share": 0.3}, {"share": 0.1}], None, [3, 100], [3, 1]),
        ([{"share": 1}, {"share": 1}, {"count": 10}], 30, [100, 100, 50], [10, 10, 10]),
        ([{"share": 1}, {"share": 1}, {"count": 10}], 5, [100, 100, 50], [0, 0, 10]),
        ([{"share": 1}, {}], None, [4, 6], [4, 6]),
        ([{"share": 1}, {"share": 1}], None, [0, 9], [0, 0]),
        ([{"share": 7}, {"share": 1e-9}], None, [942500389, 10**12], [942500389, 0]),
    ],
)
def test_shares(wanted, total, available, taken):
    sources = [MixtureSource(str(at), "", "input_output", **each) for at, each in enumerate(wanted)]
    assert apportion(sources, total, available) == taken
