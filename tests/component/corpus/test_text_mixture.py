"""What is mixed into a pretraining corpus: all that is wrong with a YAML at once, and shares of tokens."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from component.corpus.mixture import lost_shares
from component.corpus.pretrain import Choice
from component.corpus.sampling import sample_key, text_hash
from component.corpus.text_mixture import TextMixture, TextSource, read_text_mixture, sample_mixture
from component.error import UserError
from tests.conftest import ROOT
from tests.words import write_lines


@pytest.fixture
def config(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"text": "a"})

    def write(*sources: object, **top) -> Path:
        file = tmp_path / "sources.yaml"
        file.write_text(yaml.safe_dump({"sources": list(sources)} | top))
        return file

    return write


def test_a_right_one(config, tmp_path):
    path = str(tmp_path / "a.jsonl")
    mixture = read_text_mixture(
        config(
            {"name": "one", "path": path, "share": 0.5, "min_tokens": 1, "long_texts": "split"},
            {"name": "two", "path": path, "count": 10, "text_key": "content"},
            total=7,
            unit="texts",
        )
    )
    assert (mixture.total, mixture.unit) == (7, "texts")
    assert mixture.sources == [
        TextSource("one", path, 0.5, None, 1, 32768, "split", "text", [tmp_path / "a.jsonl"]),
        TextSource("two", path, None, 10, 4096, 32768, "drop", "content", [tmp_path / "a.jsonl"]),
    ]


def test_everything_wrong_is_told_at_once(config, tmp_path):
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(UserError) as refusal:
        read_text_mixture(
            config(
                {
                    "name": "one",
                    "path": path,
                    "min_token": 3,
                    "min_tokens": 9,
                    "max_tokens": 8,
                    "share": 1,
                    "count": 2,
                },
                {"name": "two", "max_tokens": "8", "long_texts": "cut", "text_key": 3},
                "text",
                unit="bytes",
            )
        )
    keys = "name, path, share, count, min_tokens, max_tokens, long_texts, text_key"
    assert str(refusal.value).splitlines() == [
        f"{tmp_path}/sources.yaml:",
        "  unit: 'bytes' is not one of tokens, texts",
        f"  sources[0] (one): unknown key 'min_token' (did you mean min_tokens?); known: {keys}",
        "  sources[0] (one): share and count exclude each other; remove one",
        "  sources[0] (one): min_tokens 9 is above max_tokens 8",
        "  sources[1] (two): path is missing",
        "  sources[1] (two): max_tokens: '8'; use a whole number of at least 1",
        "  sources[1] (two): long_texts: 'cut' is not one of drop, split",
        "  sources[1] (two): text_key: 3 is not a string",
        f"  sources[2]: 'text' is not a mapping with keys ({keys})",
    ]


def test_zero_is_no_default(config, tmp_path):
    entry = {"name": "one", "path": str(tmp_path / "a.jsonl"), "min_tokens": 0, "max_tokens": 100}
    with pytest.raises(UserError, match=r"min_tokens: 0; use a whole number of at least 1$"):
        read_text_mixture(config(entry))


def test_a_share_of_which_nothing_is_left_is_told():
    """One of nothing takes everybody's share; one of which no text is small enough goes alone."""
    texts = scan_of([("a", 10), ("b", 10)], [], [("c", 90)])

    def lost(*shares: float | None) -> list[str]:
        sources = [TextSource(name, "", share=share) for name, share in zip("abc", shares, strict=True)]
        return lost_shares(sources, sample_mixture(texts, TextMixture(sources), 0)[1])

    assert lost(1, 1, 2) == ["b: nothing in it fits, and the scarcest source decides what others get"]
    assert lost(1, None, 2) == ["c: share 2 comes to less than the first that was drawn of its 1"]
    assert lost(1, None, 5) == lost(1, None, None) == []


def test_the_shipped_example_is_right(monkeypatch):
    monkeypatch.setattr("component.corpus.mixture.resolve_files", lambda path, place: [Path(path)])
    mixture = read_text_mixture(ROOT / "script/data/pretrain_sources.yaml")
    assert [source.share for source in mixture.sources] == [3, 3, 4]


def scan_of(*sources: list[tuple[str, int]]):
    """A scan of one file per source, of (text, tokens)."""
    rows = [
        (file, (number, 0, len(text), tokens, text_hash(text)))
        for file, texts in enumerate(sources)
        for number, (text, tokens) in enumerate(texts)
    ]
    files = [SimpleNamespace(group=group) for group in range(len(sources))]
    counts = [SimpleNamespace(kept=len(texts)) for texts in sources]
    return SimpleNamespace(files=files, counts=counts, rows=lambda: iter(rows))


def slow_sample(texts: list[tuple[str, int]], quota: int, seed: int) -> set[str]:
    """The texts of lowest key, one after the other, until one would exceed the quota."""
    taken, total = set(), 0
    for text, tokens in sorted(texts, key=lambda pair: sample_key(text_hash(pair[0]), seed)):
        total += tokens
        if total > quota:
            break
        taken.add(text)
    return taken


@pytest.mark.parametrize("seed", range(5))
def test_shares_of_tokens(seed):
    draw = np.random.default_rng(seed)
    long = [(f"long {at}", int(draw.integers(500, 900))) for at in range(40)]
    short = [(f"short {at}", int(draw.integers(5, 30))) for at in range(2000)] + long[:3]  # duplicates of the first
    sources = [TextSource("long", "", share=3), TextSource("short", "", share=2)]
    choices, found = sample_mixture(scan_of(long, short), TextMixture(sources, total=20_000), seed)
    assert [entry["available"] for entry in found] == [40, 2000]
    assert found[0]["available_tokens"] == sum(tokens for _, tokens in long)
    for entry, quota, most in zip(found, (12_000, 8_000), (900, 30), strict=True):
        assert quota - most < entry["sampled_tokens"] <= quota
    assert choices == sorted(choices, key=lambda choice: (choice.file, choice.number))
    texts = [{long[c.number][0] for c in choices if c.file == 0}, {short[c.number][0] for c in choices if c.file == 1}]
    assert texts == [slow_sample(long, 12_000, seed), slow_sample(short[:2000], 8_000, seed)]
    assert isinstance(choices[0], Choice)


def test_the_scarcest_source_decides():
    texts = [[(f"{name} {at}", 10) for at in range(count)] for name, count in (("a", 6), ("b", 100), ("c", 4))]
    sources = [TextSource("a", "", share=2), TextSource("b", "", share=1), TextSource("c", "")]
    for unit in ("tokens", "texts"):
        _, found = sample_mixture(scan_of(*texts), TextMixture(sources, unit=unit), 0)
        assert [entry["sampled"] for entry in found] == [6, 3, 4]
    sources[1] = TextSource("b", "", count=25)
    for unit, taken in (("tokens", 2), ("texts", 25)):
        _, found = sample_mixture(scan_of(*texts), TextMixture(sources, unit=unit), 0)
        assert [entry["sampled"] for entry in found] == [6, taken, 4]
