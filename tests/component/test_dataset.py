"""What is one training sample? Ids and labels written out, with a tokenizer whose ids can be read: one per word."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from component.data.dataset import load_samples
from component.error import UserError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
WORDS = ["<s>", "</s>", "<unk>", "a", "b", "c", "d", "e", "USER:", "ASSISTANT:"]
BOS, EOS, A, B, C, D, E = 0, 1, 3, 4, 5, 6, 7

pytestmark = pytest.mark.usefixtures("own_cache")


def word_tokenizer(single: str = "<s> $A") -> PreTrainedTokenizerFast:
    """One id per word, in the order of WORDS; `single` says what stands around a text."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*WORDS, *SYSTEM.split()]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def words():
    return word_tokenizer()


@pytest.fixture
def write(tmp_path):
    def run(*records, name: str = "data.jsonl") -> str:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(file)

    return run


def texts(*contents: str) -> list[dict]:
    return [{"text": content} for content in contents]


def rows(dataset) -> list[tuple[list[int], list[int]]]:
    return [(row["input_ids"], row["labels"]) for row in dataset]


# --- pretraining ---


def test_every_token_but_the_first_is_learnt_the_end_too(write, words):
    samples, _ = load_samples(write(*texts("a b c")), words, 8, sft=False)
    assert samples.column_names == ["input_ids", "labels"]
    assert rows(samples) == [([BOS, A, B, C, EOS], [-100, A, B, C, EOS])]


@pytest.mark.parametrize(
    ("max_seq_length", "ids", "cut"),
    [(6, [BOS, A, B, C, EOS], 0), (5, [BOS, A, B, C, EOS], 0), (3, [BOS, A, B], 1), (2, [BOS, A], 1)],
)
def test_what_is_longer_is_cut_at_the_end_and_counted(max_seq_length, ids, cut, write, words):
    samples, report = load_samples(write(*texts("a b c")), words, max_seq_length, sft=False)
    assert rows(samples) == [(ids, [-100, *ids[1:]])]
    assert report.cut == cut


def test_no_end_of_sequence_where_it_does_not_fit(write, words):
    samples, _ = load_samples(write(*texts("a b c")), words, 4, sft=False)
    assert rows(samples) == [([BOS, A, B, C], [-100, A, B, C])]


def test_a_text_many_times_too_long(write, words):
    samples, report = load_samples(write(*texts("a b c d e " * 1000)), words, 4, sft=False)
    assert rows(samples) == [([BOS, A, B, C], [-100, A, B, C])]
    assert (report.cut, report.tokens) == (1, 4)


def test_a_tokenizer_without_a_beginning_token(write):
    samples, _ = load_samples(write(*texts("a b")), word_tokenizer("$A"), 8, sft=False)
    assert rows(samples) == [([A, B, EOS], [-100, B, EOS])]


def test_a_tokenizer_that_ends_sequences_itself(write):
    samples, _ = load_samples(write(*texts("a b")), word_tokenizer("<s> $A </s>"), 8, sft=False)
    assert rows(samples) == [([BOS, A, B, EOS], [-100, A, B, EOS])]


def test_a_genuine_end_of_sequence_inside_a_text_is_learnt(write, words):
    samples, _ = load_samples(write(*texts("a </s> b")), words, 8, sft=False)
    assert rows(samples) == [([BOS, A, EOS, B, EOS], [-100, A, EOS, B, EOS])]


def test_an_end_of_sequence_at_the_cut_hides_no_cut(write, words):
    samples, report = load_samples(write(*texts("a b </s> d")), words, 4, sft=False)
    assert rows(samples) == [([BOS, A, B, EOS], [-100, A, B, EOS])]
    assert report.cut == 1


def test_order_and_counts(write, words):
    file = write(*texts("a", "", "b c d e", " \n\t ", "c"))
    with Path(file).open("a") as more:
        more.write("\n   \n")  # blank lines are no lines
    samples, report = load_samples(file, words, 4, sft=False)
    assert [ids for ids, _ in rows(samples)] == [[BOS, A, EOS], [BOS, B, C, D], [BOS, C, EOS]]
    assert (report.lines, report.samples, report.dropped, report.cut, report.tokens) == (5, 3, 2, 1, 10)
    assert report.files == [file]
    for number in ("3 samples", "10 tokens", "1 cut", "2 of 5 lines dropped", file):
        assert number in str(report)


def test_other_keys_are_left_alone(write, words):
    record = {"id": "Chesterton_1908", "year": 1908, "text": "a", "meta": {"red_pajama_subset": "book"}}
    samples, _ = load_samples(write(record), words, 8, sft=False)
    assert samples.column_names == ["input_ids", "labels"]
    assert rows(samples) == [([BOS, A, EOS], [-100, A, EOS])]


def test_files_written_on_windows(tmp_path, words):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a b"}\r\n{"text": "c"}\r\n')
    samples, report = load_samples(str(file), words, 8, sft=False)
    assert [ids for ids, _ in rows(samples)] == [[BOS, A, B, EOS], [BOS, C, EOS]]
    assert report.lines == 2


def test_only_line_ends_end_lines(tmp_path, words):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    samples, _ = load_samples(str(file), words, 8, sft=False)
    assert [ids for ids, _ in rows(samples)] == [[BOS, A, B, C, EOS]]


# --- instruction tuning ---

PROMPT = [*SYSTEM.split(), "USER:", "a", "b", "ASSISTANT:"]


def test_only_the_answer_and_its_end_are_learnt(write, words):
    samples, _ = load_samples(write({"input": "a b", "output": "c d"}), words, 64, sft=True)
    ((ids, labels),) = rows(samples)
    assert words.convert_ids_to_tokens(ids) == [*PROMPT, "c", "d", "</s>"], "no <s>: as the original"
    assert labels == [-100] * len(PROMPT) + [C, D, EOS]


@pytest.mark.parametrize(
    ("room", "learnt", "cut"), [(4, [C, D, EOS], 0), (3, [C, D, EOS], 0), (2, [C, D], 1), (1, [C], 1)]
)
def test_answers_are_cut_at_the_end(room, learnt, cut, write, words):
    file = write({"input": "a b", "output": "c d"})
    samples, report = load_samples(file, words, len(PROMPT) + room, sft=True)
    ((ids, labels),) = rows(samples)
    assert labels == [-100] * len(PROMPT) + learnt
    assert len(ids) == len(labels)
    assert report.cut == cut


def test_answers_without_a_label_left_are_dropped_and_counted(write, words):
    long, short = {"input": "a b", "output": "c"}, {"input": "a", "output": "d"}
    file = write(long, short, {"input": "a", "output": "  "})
    samples, report = load_samples(file, words, len(PROMPT), sft=True)
    assert [labels for _, labels in rows(samples)] == [[-100] * (len(PROMPT) - 1) + [D]]
    assert (report.lines, report.samples, report.dropped, report.cut) == (3, 1, 2, 1)


def test_an_empty_question_is_one(write, words):
    samples, _ = load_samples(write({"input": "", "output": "c"}), words, 64, sft=True)
    assert [label for label in rows(samples)[0][1] if label != -100] == [C, EOS]


# --- the cache ---


def test_samples_are_tokenised_once_and_lie_on_disk(write, words):
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
