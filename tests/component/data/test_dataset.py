"""What is a data set? Tokenised once and kept on disk, or streamed; from a folder, a file, or the hub."""

import os
from itertools import islice
from pathlib import Path

import pytest

from component.data.dataset import SHUFFLED_SAMPLES, load_samples
from component.data.token_file import index_path
from component.error import UserError
from tests.chat_words import MANY, PROMPT, X, rows, texts, with_bad_lines, word_tokenizer

BOS, EOS, A, B, C, D, E = 0, 1, 3, 4, 5, 6, 7

pytestmark = pytest.mark.usefixtures("own_cache")


def test_order_and_counts(write, words):
    file = write(*texts("a", "", "b c d e", " \n\t ", "c"))
    with Path(file).open("a") as more:
        more.write("\n   \n")  # blank lines are no lines
    samples, report = load_samples(file, words, 4, sft=False)
    assert [ids for ids, _ in rows(samples)] == [[BOS, A, EOS], [BOS, B, C, D], [BOS, C, EOS]]
    assert (report.lines, report.samples, report.dropped, report.cut, report.tokens) == (5, 3, 2, 1, 10)
    assert report.files == [file]
    for number in ("3 samples", "10 tokens", "1 truncated", "2 of 5 lines dropped", file):
        assert number in str(report)


# --- the cache ---


def test_samples_are_tokenized_once_and_lie_on_disk(write, words):
    file = write(*texts("a b"))
    first, _ = load_samples(file, words, 8, sft=False)
    (cached,) = {entry["filename"] for entry in first.cache_files}
    written = Path(cached).stat().st_mtime_ns
    again, report = load_samples(file, word_tokenizer(), 8, sft=False)
    assert [entry["filename"] for entry in again.cache_files] == [cached]
    assert Path(cached).stat().st_mtime_ns == written
    assert rows(again) == rows(first)
    assert (report.samples, report.tokens) == (1, 4)


def test_a_changed_file_is_read_again(write, words):
    file = write(*texts("a b"))
    load_samples(file, words, 8, sft=False)
    before = Path(file).stat()
    write(*texts("c d"))  # of the same size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    samples, _ = load_samples(file, words, 8, sft=False)
    assert rows(samples) == [([BOS, C, D, EOS], [-100, C, D, EOS])]


def test_another_setting_is_another_sample(write, words):
    file = write({"text": "a b", "input": "a", "output": "b"})
    load_samples(file, words, 8, sft=False)
    assert rows(load_samples(file, words, 3, sft=False)[0]) == [([BOS, A, B], [-100, A, B])]
    assert rows(load_samples(file, word_tokenizer("$A"), 8, sft=False)[0]) == [([A, B, EOS], [-100, B, EOS])]
    assert rows(load_samples(file, words, 64, sft=True)[0])[0][1][-2:] == [B, EOS]


# --- where files come from ---


def test_a_folder_of_files(write, words, tmp_path):
    write(*texts("c"), name="more/b.jsonl")
    write(*texts("a", "b"), name="more/a.jsonl")
    write(*texts("d"), name="more/notes.json")
    samples, report = load_samples(str(tmp_path / "more"), words, 8, sft=False)
    assert [ids[1] for ids, _ in rows(samples)] == [A, B, C]
    assert report.files == [str(tmp_path / "more" / name) for name in ("a.jsonl", "b.jsonl")]
    assert report.lines == 3


# huggingface.co/datasets/YeungNLP/LongQLoRA-Dataset, as listed there
PUBLISHED = [
    ".gitattributes",
    "LongQLoRA-Pretrain-Data-54k.jsonl",
    "LongQLoRA-SFT-Data-39k.jsonl",
    "pg19-test.bin",
    "pg19-validation.bin",
    "proof-pile-test.bin",
]


@pytest.fixture
def hub(monkeypatch, write):
    """The published data sets, in small; returns what was asked for."""
    asked = []
    files = {
        PUBLISHED[1]: write(*texts("a b c", "d"), name=PUBLISHED[1]),
        PUBLISHED[2]: write({"input": "a b", "output": "c d"}, name=PUBLISHED[2]),
    }

    def download(repo_id, filename, *, repo_type=None, **kwargs):
        asked.append((repo_id, filename, repo_type))
        return files[filename]

    monkeypatch.setattr("component.data.source.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repo_id, **kwargs: PUBLISHED)
    return asked


def test_the_published_pretraining_data(hub, words):
    source = "YeungNLP/LongQLoRA-Dataset/LongQLoRA-Pretrain-Data-54k.jsonl"
    samples, report = load_samples(source, words, 8, sft=False)
    assert rows(samples) == [([BOS, A, B, C, EOS], [-100, A, B, C, EOS]), ([BOS, D, EOS], [-100, D, EOS])]
    assert report.samples == 2
    assert hub == [("YeungNLP/LongQLoRA-Dataset", "LongQLoRA-Pretrain-Data-54k.jsonl", "dataset")]


def test_the_published_instructions(hub, words):
    source = "YeungNLP/LongQLoRA-Dataset/LongQLoRA-SFT-Data-39k.jsonl"
    samples, _ = load_samples(source, words, 64, sft=True)
    assert rows(samples)[0][1] == [-100] * len(PROMPT) + [C, D, EOS]


def test_a_data_set_of_several_files_needs_one_named(hub, words):
    with pytest.raises(UserError) as refusal:
        load_samples("YeungNLP/LongQLoRA-Dataset", words, 8, sft=False)
    for part in ("train_file", "YeungNLP/LongQLoRA-Dataset", *PUBLISHED[1:3]):
        assert part in str(refusal.value)
    assert hub == []


def test_a_data_set_of_one_file(hub, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repo_id, **kwargs: PUBLISHED[:2])
    assert load_samples("YeungNLP/LongQLoRA-Dataset", words, 8, sft=False)[1].samples == 2


def test_a_file_of_that_name_here_wins_over_the_hub(hub, words, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(*texts("e"), name="data/train.jsonl")
    samples, _ = load_samples("data/train.jsonl", words, 8, sft=False)
    assert rows(samples) == [([BOS, E, EOS], [-100, E, EOS])]
    assert hub == []


# --- streams ---


def one_pass(stream) -> list[dict]:
    return list(stream.one_pass)


@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_pass_over_a_stream_is_the_set_on_disk(policy, packing, write, words):
    file = write(*MANY * 100)  # more than are shuffled at a time
    options = {"sft": False, "truncation_policy": policy}
    kept, _ = load_samples(file, words, 4, **options)
    assert len(kept) > SHUFFLED_SAMPLES or policy == "drop"
    stream, _ = load_samples(file, words, 4, **options, streaming=True, packing=packing)
    found = one_pass(stream)
    documents = []
    for row in found:
        starts = [at for at, position in enumerate(row.get("position_ids", [0])) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            documents.append((row["input_ids"][start:end], row["labels"][start:end]))
    assert documents != rows(kept)  # shuffled
    assert sorted(documents) == sorted(rows(kept))


def test_a_stream_goes_on_forever_each_pass_in_another_order(write, words):
    file = write(*texts(*"abcde"))
    stream, told = load_samples(file, words, 8, sft=False, streaming=True)
    found = [row["input_ids"][1] for row in islice(stream, 15)]
    passes = [found[:5], found[5:10], found[10:]]
    assert [sorted(order) for order in passes] == [[A, B, C, D, E]] * 3
    assert passes[0] != passes[1] or passes[1] != passes[2]
    assert [
        row["input_ids"][1] for row in islice(stream, 15)
    ] == found  # from the run the command again, as a resumed run does
    other, _ = load_samples(file, words, 8, sft=False, streaming=True, seed=1)
    assert [row["input_ids"][1] for row in islice(other, 15)] != found
    assert told == f"streamed from {file}"


def test_a_stream_of_several_files(write, words, tmp_path):
    write(*texts("a", "b"), name="more/1.jsonl")
    write(*texts("c"), name="more/2.jsonl")
    stream, told = load_samples(str(tmp_path / "more"), words, 8, sft=False, streaming=True)
    assert sorted(row["input_ids"][1] for row in one_pass(stream)) == [A, B, C]
    assert told == f"streamed from {tmp_path / 'more' / '1.jsonl'}, {tmp_path / 'more' / '2.jsonl'}"


def test_a_stream_is_refused_while_it_runs(tmp_path, words):
    """As soon as there is enough to judge by, not at its end; and at the end of a short one."""
    (tmp_path / "long.jsonl").write_text(
        '{"text": "a"}\n' * 800 + '{"txt": "a"}\n' * 300 + '{"text": "b"}\n' * 100_000
    )
    stream, _ = load_samples(str(tmp_path / "long.jsonl"), words, 8, sft=False, streaming=True)
    seen: list[dict] = []
    with pytest.raises(UserError, match=r"lines can't be used, more than max_bad_fraction 0\.01 allows") as refusal:
        seen.extend(stream)
    assert len(seen) < 2000
    assert f"{tmp_path / 'long.jsonl'}:801: " in str(refusal.value)
    file = with_bad_lines(tmp_path, 50, 1)
    with pytest.raises(UserError, match="1 of 51 lines can't be used"):
        list(islice(load_samples(file, words, 8, sft=False, streaming=True)[0], 100))
    patient, _ = load_samples(file, words, 8, sft=False, streaming=True, max_bad_fraction=0.02)
    assert len(list(islice(patient, 100))) == 100


def test_a_stream_without_anything_to_learn_ends(write, words):
    stream, _ = load_samples(write(*texts("", "  ")), words, 8, sft=False, streaming=True)
    with pytest.raises(UserError, match=r"train_file: .*data\.jsonl: no label tokens"):
        next(iter(stream))


# --- the cache ---


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"truncation_policy": "split"}, [[BOS, A, B, C], [BOS, D, EOS]]),
        ({"truncation_policy": "drop"}, []),
        ({}, [[BOS, A, B, C]]),
    ],
)
def test_another_policy_is_never_served_old_tokens(changes, expected, write, words):
    file = write(*texts("e", "a b c d"))
    for policy in ("truncate", "split", "drop"):
        load_samples(file, words, 4, sft=False, truncation_policy=policy)
    samples, _ = load_samples(file, words, 4, sft=False, **changes)
    assert [ids for ids, _ in rows(samples)] == [[BOS, E, EOS], *expected]


@pytest.mark.parametrize("changes", [{}, {"truncation_policy": "split"}, {"truncation_policy": "drop"}])
def test_the_same_options_are_served_from_the_cache(changes, write, words, monkeypatch):
    file = write(*texts("e", "a b c d", ""))
    first, report = load_samples(file, words, 4, sft=False, **changes)
    cached = [entry["filename"] for entry in first.cache_files]
    written = [Path(name).stat().st_mtime_ns for name in cached]
    again, same = load_samples(file, word_tokenizer(), 4, sft=False, **changes)
    assert [entry["filename"] for entry in again.cache_files] == cached
    assert [Path(name).stat().st_mtime_ns for name in cached] == written
    assert rows(again) == rows(first)
    assert (report, str(report)) == (same, str(same))
    packed, _ = load_samples(file, word_tokenizer(), 4, sft=False, packing=True, **changes)
    assert [entry["filename"] for entry in packed.documents.cache_files] == cached


def test_another_index_is_another_file(tokens, words):
    """The tokens are the same, but not where documents start."""
    file = tokens("none", "none")
    first, _ = load_samples(file, words, 16, sft=False)
    assert [ids for ids, _ in rows(first)] == [[A, B, C], [E, A, B, C, D, E]]
    index_path(file).unlink()
    again, _ = load_samples(file, words, 16, sft=False)
    assert [ids for ids, _ in rows(again)] == [[A, B, C, D, E, A, B, C, D, E]]


def test_another_chat_template_is_another_sample(write, words):
    file = write({"input": "a", "output": "b"})
    found = []
    for end in ("</s>", "c </s>"):
        tokenizer = word_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{{ ' ' + m.content }}{% if m.role == 'assistant' %} END{% endif %}{% endfor %}"
        ).replace("END", end)
        found.append(rows(load_samples(file, tokenizer, 8, sft=True, template="tokenizer")[0]))
    assert found == [[([A, B, EOS], [X, B, EOS])], [([A, B, C, EOS], [X, B, C, EOS])]]
    vicuna = rows(load_samples(file, tokenizer, 64, sft=True)[0])
    assert len(vicuna[0][0]) > 8
