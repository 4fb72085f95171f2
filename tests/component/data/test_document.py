"""A line, a chat or a stretch of tokens: which ids and labels does it give? Written out, one id per word."""

import gzip
import json
import lzma
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from component.data.dataset import load_samples
from component.data.token_file import index_path
from component.error import UserError
from tests.chat_words import BOS, EOS, PROMPT, A, B, C, D, E, X, outcomes, rows, texts, with_bad_lines, word_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


# --- pretraining ---


def test_every_token_but_the_first_is_learnt_the_end_too(write, words):
    samples, _ = load_samples(write(*texts("a b c")), words, 8, sft=False)
    assert samples.column_names == ["input_ids", "labels"]
    assert rows(samples) == [([BOS, A, B, C, EOS], [-100, A, B, C, EOS])]


def test_no_end_of_sequence_where_it_does_not_fit(write, words):
    samples, _ = load_samples(write(*texts("a b c")), words, 4, sft=False)
    assert rows(samples) == [([BOS, A, B, C], [-100, A, B, C])]


def test_a_tokenizer_without_a_beginning_token(write):
    samples, _ = load_samples(write(*texts("a b")), word_tokenizer("$A"), 8, sft=False)
    assert rows(samples) == [([A, B, EOS], [-100, B, EOS])]


def test_a_tokenizer_that_ends_sequences_itself(write):
    samples, _ = load_samples(write(*texts("a b")), word_tokenizer("<s> $A </s>"), 8, sft=False)
    assert rows(samples) == [([BOS, A, B, EOS], [-100, A, B, EOS])]


def test_a_genuine_end_of_sequence_inside_a_document_is_learnt(tmp_path, words):
    np.array([BOS, A, EOS, B, EOS], np.uint16).tofile(tmp_path / "tokens.bin")
    samples, _ = load_samples(str(tmp_path / "tokens.bin"), words, 8, sft=False)
    assert rows(samples) == [([BOS, A, EOS, B, EOS], [-100, A, EOS, B, EOS])]


def test_special_tokens_in_a_text_are_text(write, words):
    """K9b: a document about </s> ended there; written by somebody, it is a word, here an unknown one."""
    samples, _ = load_samples(write(*texts("a </s> b <s>", "a b")), words, 8, sft=False)
    unknown = words.unk_token_id
    assert [ids for ids, _ in rows(samples)] == [[BOS, A, unknown, B, unknown, EOS], [BOS, A, B, EOS]]


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


def test_only_the_answer_and_its_end_are_learnt(write, words):
    samples, _ = load_samples(write({"input": "a b", "output": "c d"}), words, 64, sft=True)
    ((ids, labels),) = rows(samples)
    assert words.convert_ids_to_tokens(ids) == [*PROMPT, "c", "d", "</s>"], "no <s>: as the original"
    assert labels == [-100] * len(PROMPT) + [C, D, EOS]


def test_an_empty_question_is_one(write, words):
    samples, _ = load_samples(write({"input": "", "output": "c"}), words, 64, sft=True)
    assert [label for label in rows(samples)[0][1] if label != -100] == [C, EOS]


@pytest.mark.parametrize(("allowed", "good", "bad"), [(0.01, 99, 1), (0.5, 5, 5), (0.05, 96, 4), (0, 3, 0)])
def test_few_bad_lines_are_left_out_and_told(allowed, good, bad, tmp_path, words):
    file = with_bad_lines(tmp_path, good, bad)
    samples, report = load_samples(file, words, 8, sft=False, max_bad_fraction=allowed)
    half = good // 2
    assert [ids[1] for ids, _ in rows(samples)] == [A] * half + [B] * (good - half)
    assert report.lines == good + bad
    if bad:
        assert f"{bad} of {good + bad} lines skipped: {file}:{half + 1}: " in str(report)
        assert f'{file}:{half + 1}: "text" is 5, not a text' in str(report)
    else:
        assert "left out" not in str(report)


@pytest.mark.parametrize(("allowed", "good", "bad"), [(0.01, 98, 1), (0.4, 5, 5), (0, 99, 1), (0.039, 96, 4)])
def test_too_many_bad_lines_are_refused_with_their_places(allowed, good, bad, tmp_path, words):
    file = with_bad_lines(tmp_path, good, bad)
    with pytest.raises(UserError) as refusal:
        load_samples(file, words, 8, sft=False, max_bad_fraction=allowed, field="eval_file")
    heading = f"eval_file: {bad} of {good + bad} lines can't be used, more than max_bad_fraction {allowed:g} allows"
    assert str(refusal.value).startswith(heading)
    for place in range(bad):
        assert f"{file}:{good // 2 + place + 1}: " in str(refusal.value)


def test_half_an_object_is_no_line_of_chats(write, words):
    """A chat of another order is a bad line as any other: counted, named, left out."""
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = write(*[good] * 99, {"messages": good["messages"][::-1]})
    samples, report = load_samples(file, words, 64, sft=True)
    assert len(samples) == 99
    assert f'1 of 100 lines skipped: {file}:100: "messages": assistant, user; user and assistant must' in str(report)
    with pytest.raises(UserError, match=r"data\.jsonl:100: "):
        load_samples(file, words, 64, sft=True, max_bad_fraction=0)


# --- chats ---

CHATS = [
    {"input": "a", "output": "b"},
    {
        "messages": [
            {"role": "system", "content": "e"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b c"},
            {"role": "user", "content": "d"},
            {"role": "assistant", "content": "a"},
        ]
    },
    {"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
    {"conversations": [{"from": "human", "value": "c"}]},
]
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m.role] + m.content }}"
    "{% if m.role == 'assistant' %}{{ ' </s>' }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


@pytest.mark.parametrize("streaming", [False, True])
def test_chats_of_all_kinds(streaming, write, words):
    user, bot = words.convert_tokens_to_ids(["USER:", "ASSISTANT:"])
    words.chat_template = PLAIN_TEMPLATE
    samples, _ = load_samples(write(*CHATS), words, 64, sft=True, template="tokenizer", streaming=streaming)
    expected = [
        ([user, A, bot, B, EOS], [X, X, X, B, EOS]),
        ([user, C, bot, D, EOS], [X, X, X, D, EOS]),
        ([E, user, A, bot, B, C, EOS, user, D, bot, A, EOS], [X, X, X, X, B, C, EOS, X, X, X, A, EOS]),
    ]
    assert sorted(rows(islice(samples, 3))) == sorted(expected)


def test_chats_of_all_kinds_as_vicuna_spells_them(write, words):
    samples, report = load_samples(write(*CHATS), words, 64, sft=True)
    spelt = [words.convert_ids_to_tokens(ids) for ids, _ in rows(samples)]
    frame = [*PROMPT[: PROMPT.index("USER:")], "USER:"]
    assert spelt == [
        [*frame, "a", "ASSISTANT:", "b", "</s>"],
        ["e", "USER:", "a", "ASSISTANT:", "b", "c", "</s>", "USER:", "d", "ASSISTANT:", "a", "</s>"],
        [*frame, "c", "ASSISTANT:", "d", "</s>"],
    ]
    assert [[label for label in labels if label != X] for _, labels in rows(samples)] == [
        [B, EOS],
        [B, C, EOS, A, EOS],
        [D, EOS],
    ]
    assert report.outcomes == outcomes(whole=3, empty=1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
            + PLAIN_TEMPLATE,
            r"rejects a conversation \(no system, please\)",
        ),
        (
            PLAIN_TEMPLATE.replace("m.content }}", "m.content + (' a' if loop.last else '') }}"),
            "changes earlier turns",
        ),
        (None, "no chat template"),
    ],
)
def test_a_template_that_does_not_fit_is_one_message(template, problem, streaming, write, words):
    """Whichever line it is that does not go into it; here the second."""
    words.chat_template = template
    with pytest.raises(UserError, match=problem):
        list(islice(load_samples(write(*CHATS), words, 64, sft=True, template="tokenizer", streaming=streaming)[0], 9))


# --- files of every kind ---

RECORDS = texts("a b", "c", "d e a b c")
SAMPLES = [[BOS, A, B, EOS], [BOS, C, EOS], [BOS, D, E, A]]


def packed_file(tmp_path: Path, kind: str) -> str:
    file, content = tmp_path / f"data{kind}", "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    if kind == ".json":
        content = json.dumps(RECORDS).encode()
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), file)
        return str(file)
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
    file.write_bytes(compress.get(file.suffix, lambda data: data)(content))
    return str(file)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet"])
def test_records_of_every_kind(kind, streaming, tmp_path, words):
    file = packed_file(tmp_path, kind)
    samples, _ = load_samples(file, words, 4, sft=False, streaming=streaming)
    found = rows(islice(samples, 3))
    assert (sorted(found) if streaming else found) == [
        (ids, [X, *ids[1:]]) for ids in (sorted(SAMPLES) if streaming else SAMPLES)
    ]


@pytest.mark.parametrize("pack", [None, gzip.compress])
def test_a_text_file_is_one_text(pack, tmp_path, words):
    file = tmp_path / ("book.txt.gz" if pack else "book.txt")
    content = b"a b\n\nc d e\n"
    file.write_bytes(pack(content) if pack else content)
    samples, report = load_samples(str(file), words, 4, sft=False, truncation_policy="split")
    assert [ids for ids, _ in rows(samples)] == [[BOS, A, B, C], [BOS, D, E, EOS]]
    assert report.lines == 1


def test_chats_in_parquet(tmp_path, words):
    """Rows of parquet have every column: what a row does not have is null."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    table = pyarrow.Table.from_pylist([{"messages": turns, "source": None}, {"messages": turns, "source": "x"}])
    pyarrow.parquet.write_table(table, tmp_path / "chats.parquet")
    samples, _ = load_samples(str(tmp_path / "chats.parquet"), words, 64, sft=True)
    assert [[label for label in labels if label != X] for _, labels in rows(samples)] == [[B, EOS]] * 2


@pytest.mark.parametrize(
    ("bos", "eos", "documents"),
    [
        ("each", "each", [[BOS, A, B, C, EOS], [BOS, EOS], [BOS, D, EOS], [BOS, E, A, B, C, D]]),
        ("first", "each", [[BOS, A, B, C, EOS], [D, EOS], [E, A, B, C, D, E]]),
        ("none", "none", [[A, B, C], [E, A, B, C, D, E]]),  # the first token of a document is nobody's label
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_documents_of_tokens(bos, eos, documents, streaming, tokens, words):
    samples, report = load_samples(tokens(bos, eos), words, 6, sft=False, streaming=streaming)
    found = rows(islice(samples, len(documents)))
    assert (sorted(found) if streaming else found) == [
        (ids, [X, *ids[1:]]) for ids in (sorted(documents) if streaming else documents)
    ]
    if not streaming:
        assert report.lines == 4


def test_long_documents_of_tokens_are_split(tokens, words):
    samples, _ = load_samples(tokens(), words, 4, sft=False, truncation_policy="split")
    assert [ids for ids, _ in rows(samples)] == [
        [BOS, A, B, C],  # its end is left: nothing but an end
        [BOS, EOS],
        [BOS, D, EOS],
        [BOS, E, A, B],
        [BOS, C, D, E],
    ]


def test_tokens_without_an_index_are_one_document(tokens, words):
    file = tokens("none", "each")
    index_path(file).unlink()
    samples, report = load_samples(file, words, 4, sft=False, truncation_policy="split")
    flow = [A, B, C, EOS, EOS, D, EOS, E, A, B, C, D, E, EOS]
    assert rows(samples) == [(flow[at : at + 4], [X, *flow[at + 1 : at + 4]]) for at in (0, 4, 8, 12)]
    assert report.outcomes == outcomes(split=1, piece=3)


def test_tokens_without_an_index_are_not_cut_after_the_first(tokens, words):
    file = tokens("none", "each")
    index_path(file).unlink()
    with pytest.raises(UserError, match=r"t\.bin has no index .* only the first 4 of its 14 tokens .* split"):
        load_samples(file, words, 4, sft=False)
    assert len(load_samples(file, words, 14, sft=False)[0]) == 1


def test_a_piece_of_one_token_teaches_nothing(tokens, words):
    """Nothing stands before it that could predict it."""
    file = tokens("none", "none")
    index_path(file).unlink()
    samples, report = load_samples(file, words, 3, sft=False, truncation_policy="split")
    assert [ids for ids, _ in rows(samples)] == [[A, B, C], [D, E, A], [B, C, D]]  # and an E
    assert (report.outcomes, report.tokens) == (outcomes(split=1, piece=2), 9)


@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_of_another_tokenizer_are_refused(streaming, tokens, words):
    with pytest.raises(
        UserError, match=r"t\.bin was made by the tokenizer words \(\d+ tokens\), which gives other ids"
    ):
        list(islice(load_samples(tokens(), word_tokenizer_of_others(), 8, sft=False, streaming=streaming)[0], 1))


def word_tokenizer_of_others():
    other = word_tokenizer()
    other.add_tokens(["more"])
    return other


@pytest.mark.parametrize("streaming", [False, True])
def test_tokens_are_no_chats(streaming, tokens, words):
    with pytest.raises(UserError, match=r"train_file: .*t\.bin holds tokens of texts; chats \(sft: true\)"):
        list(islice(load_samples(tokens(), words, 8, sft=True, streaming=streaming)[0], 1))


@pytest.mark.parametrize("streaming", [False, True])
def test_no_file_of_tokens(streaming, tmp_path, words):
    with pytest.raises(UserError, match=r"train_file: there is no file .*none\.bin"):
        load_samples(str(tmp_path / "none.bin"), words, 8, sft=False, streaming=streaming)


def test_tokens_that_the_model_lacks(tokenizer, tmp_path, own_cache):
    """K2a: added tokens beyond the embedding were an IndexError at the first step; a longer tokenizer is harmless."""
    rows = len(tokenizer)
    tokenizer.add_tokens(["<|im_start|>"])  # not as a special token, which would stay text
    file = tmp_path / "texts.jsonl"
    lines = [{"text": "A feather."} for _ in range(199)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole, report = load_samples(str(file), tokenizer, 64, sft=False, vocab_size=rows)
    assert (len(whole), report.bad) == (199, "")
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"text": "a <|im_start|> b"}]))
    samples, report = load_samples(str(file), tokenizer, 64, sft=False, vocab_size=rows)
    assert len(samples) == 199
    assert f"1 of 200 lines skipped: {file}:200: token {rows} (<|im_start|>) is beyond" in report.bad
    assert len(load_samples(str(file), tokenizer, 64, sft=False, vocab_size=rows + 1)[0]) == 200
    with pytest.raises(UserError, match=rf"train_file: 1 of 200 lines .*\n.*texts.jsonl:200: token {rows} "):
        load_samples(str(file), tokenizer, 64, sft=False, vocab_size=rows, max_bad_fraction=0)
    file.write_text(json.dumps({"text": "<|im_start|>"}) + "\n")
    with pytest.raises(UserError, match=rf"texts.jsonl:1: token {rows} "):
        load_samples(str(file), tokenizer, 64, sft=False, vocab_size=rows)


def test_a_template_that_rejects_one_chat_of_many(tokenizer, tmp_path, own_cache):
    """K21: it stopped the run, without file or line."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no bad words') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    file = tmp_path / "chats.jsonl"
    lines = [{"input": "Q", "output": "A"} for _ in range(199)]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"input": "bad", "output": "A"}]))
    samples, report = load_samples(str(file), tokenizer, 64, sft=True, template="tokenizer")
    assert len(samples) == 199
    assert f"1 of 200 lines skipped: {file}:200: template: the tokenizer's chat template rejects" in report.bad
    assert "no bad words" in report.bad
