"""What does a document become? Cut, split or left out, line by line; from files of every kind; kept or streamed."""

import gzip
import json
import lzma
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from component.data.dataset import SHUFFLED_SAMPLES, load_samples
from component.data.sample import CUT, EMPTY, PIECE, SPLIT, TOO_LONG, WHOLE
from component.data.token_file import index_path, write_tokens
from component.error import UserError
from tests.component.test_dataset import BOS, EOS, PROMPT, A, B, C, D, E, rows, texts, word_tokenizer
from tests.words import write_lines

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def words():
    return word_tokenizer()


@pytest.fixture
def write(tmp_path):
    return lambda *records, name="data.jsonl": str(write_lines(tmp_path / name, *records))


def outcomes(**counts: int) -> tuple[int, ...]:
    found = [0] * 6
    for name, number in counts.items():
        found[{"whole": WHOLE, "cut": CUT, "split": SPLIT, "piece": PIECE, "long": TOO_LONG, "empty": EMPTY}[name]] = (
            number
        )
    return tuple(found)


# --- longer than max_seq_length ---

X = -100
POLICY_CASES = {
    # text, max_seq_length: ids and labels under truncate, split, drop
    "with room": ("a b", 8, [[BOS, A, B, EOS]], [[BOS, A, B, EOS]], [[BOS, A, B, EOS]]),
    "just fitting": ("a b", 4, [[BOS, A, B, EOS]], [[BOS, A, B, EOS]], [[BOS, A, B, EOS]]),
    "but for its end": ("a b c", 4, [[BOS, A, B, C]], [[BOS, A, B, C]], [[BOS, A, B, C]]),
    "one token longer": ("a b c d", 4, [[BOS, A, B, C]], [[BOS, A, B, C], [BOS, D, EOS]], []),
    "two tokens longer": ("a b c d e", 4, [[BOS, A, B, C]], [[BOS, A, B, C], [BOS, D, E, EOS]], []),
    "its end alone left": ("a b c d e a", 4, [[BOS, A, B, C]], [[BOS, A, B, C], [BOS, D, E, A]], []),
    "many pieces": (
        "a b c d e a b",
        3,
        [[BOS, A, B]],
        [[BOS, A, B], [BOS, C, D], [BOS, E, A], [BOS, B, EOS]],
        [],
    ),
    "pieces of one token": ("a b c", 2, [[BOS, A]], [[BOS, A], [BOS, B], [BOS, C]], []),
    "an end inside": ("a </s> b c", 4, [[BOS, A, EOS, B]], [[BOS, A, EOS, B], [BOS, C, EOS]], []),
    "an end at the cut": ("a b </s> c", 4, [[BOS, A, B, EOS]], [[BOS, A, B, EOS], [BOS, C, EOS]], []),
    "an end of its own": ("a b </s>", 4, [[BOS, A, B, EOS]], [[BOS, A, B, EOS]], [[BOS, A, B, EOS]]),
}


@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
@pytest.mark.parametrize("name", POLICY_CASES)
def test_a_long_text(name, policy, write, words):
    text, longest, *expected = POLICY_CASES[name]
    samples, _ = load_samples(
        write(*texts(text, "e")), words, max(longest, 2), sft=False, truncation_policy=policy, max_bad_fraction=0
    )
    expected = expected[["truncate", "split", "drop"].index(policy)]
    tail = [[BOS, E, EOS][:longest]]
    assert rows(samples) == [(ids, [X, *ids[1:]]) for ids in expected + tail]


WITHOUT_BOS = {
    "with room": ("a b", 8, [[A, B, EOS]], [[A, B, EOS]], [[A, B, EOS]]),
    "just fitting": ("a b", 3, [[A, B, EOS]], [[A, B, EOS]], [[A, B, EOS]]),
    "but for its end": ("a b c", 3, [[A, B, C]], [[A, B, C]], [[A, B, C]]),
    "one token longer": ("a b c d", 3, [[A, B, C]], [[A, B, C], [D, EOS]], []),
    "its end alone left": ("a b c d e a", 3, [[A, B, C]], [[A, B, C], [D, E, A]], []),
}


@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
@pytest.mark.parametrize("name", WITHOUT_BOS)
def test_a_long_text_without_a_beginning_token(name, policy, write):
    """No token stands before a piece then, and its first token is nobody's label."""
    text, longest, *expected = WITHOUT_BOS[name]
    file = write(*texts(text, "e d"))
    samples, _ = load_samples(file, word_tokenizer("$A"), longest, sft=False, truncation_policy=policy)
    expected = expected[["truncate", "split", "drop"].index(policy)] + [[E, D, EOS]]
    assert rows(samples) == [(ids, [X, *ids[1:]]) for ids in expected]


@pytest.mark.parametrize("policy", ["truncate", "split", "drop"])
def test_a_tokenizer_that_ends_texts_itself(policy, write):
    """Its end is the text's, wherever the tokenizer was told to stop."""
    file = write(*texts("a b c d e", "a b", "c d e"))
    samples, _ = load_samples(file, word_tokenizer("<s> $A </s>"), 4, sft=False, truncation_policy=policy)
    short = [[BOS, A, B, EOS], [BOS, C, D, E]]
    first = {"truncate": [[BOS, A, B, C]], "split": [[BOS, A, B, C], [BOS, D, E, EOS]], "drop": []}[policy]
    assert [ids for ids, _ in rows(samples)] == first + short


MANY = texts("a", "a b c", "a b c d", "a b c d e", "", "a b c d e a b")


@pytest.mark.parametrize(
    ("policy", "counts", "samples", "tokens", "notes"),
    [
        ("truncate", outcomes(whole=1, cut=4, empty=1), 5, 19, "4 cut to max_seq_length; "),
        ("split", outcomes(whole=2, split=3, piece=4, empty=1), 9, 33, "3 of 6 lines split into 7 samples; "),
        ("drop", outcomes(whole=2, long=3, empty=1), 2, 7, "3 of 6 lines dropped: longer than max_seq_length; "),
    ],
)
def test_counts_and_what_is_said_of_them(policy, counts, samples, tokens, notes, write, words):
    file = write(*MANY)
    found, report = load_samples(file, words, 4, sft=False, truncation_policy=policy)
    assert (report.lines, report.samples, report.tokens, report.outcomes) == (6, samples, tokens, counts)
    assert (len(found), sum(len(ids) for ids, _ in rows(found))) == (samples, tokens)
    dropped = "1 of 6 lines dropped: nothing to learn in them"
    assert str(report) == f"{samples} samples, {tokens} tokens from {file} ({notes}{dropped})"


def test_packed_samples_are_those_of_the_set(write, words):
    """The pieces of a text too; the dropped ones in no row."""
    file = write(*MANY)
    samples, _ = load_samples(file, words, 4, sft=False, truncation_policy="split")
    packed, report = load_samples(file, words, 4, sft=False, truncation_policy="split", packing=True)
    assert [packed[at] for at in range(len(packed))] == [
        {"input_ids": ids, "labels": labels, "position_ids": list(range(len(ids)))}
        for ids, labels in sorted(rows(samples), key=lambda row: -len(row[0]))
    ]
    assert str(report).endswith("; packed into 9 rows, 91.7% full)")


def test_an_answer_that_is_too_long_is_cut_or_left_out(write, words):
    """... and so is one that has no room at all; but an end alone that has none leaves the answer whole."""
    lines = [{"input": "a b", "output": answer} for answer in ("c", "c d", "c d e", "")]
    long = {"input": "a b c d", "output": "e"}  # its question fills the sample
    file = write(*lines, long)
    cut, report = load_samples(file, words, len(PROMPT) + 2, sft=True)
    assert [[label for label in labels if label != X] for _, labels in rows(cut)] == [[C, EOS], [C, D], [C, D]]
    assert report.outcomes == outcomes(whole=1, cut=2, empty=2)
    dropped, report = load_samples(file, words, len(PROMPT) + 2, sft=True, truncation_policy="drop")
    assert [[label for label in labels if label != X] for _, labels in rows(dropped)] == [[C, EOS], [C, D]]
    assert report.outcomes == outcomes(whole=2, long=2, empty=1)


def test_everything_too_long(write, words):
    with pytest.raises(UserError, match="train_file: nothing to learn in"):
        load_samples(write(*texts("a b c d")), words, 3, sft=False, truncation_policy="drop")


# --- lines that cannot be used ---

BAD = ['{"text": 5}', '{"txt": "a"}', '["text"]', '{"text": "a"', '{"text": null}']


def with_bad_lines(tmp_path: Path, good: int, bad: int) -> str:
    """Every bad line in the middle."""
    lines = ['{"text": "a"}'] * (good // 2) + BAD[:bad] + ['{"text": "b"}'] * (good - good // 2)
    (tmp_path / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(tmp_path / "data.jsonl")


@pytest.mark.parametrize(("allowed", "good", "bad"), [(0.01, 99, 1), (0.5, 5, 5), (0.05, 96, 4), (0, 3, 0)])
def test_few_bad_lines_are_left_out_and_told(allowed, good, bad, tmp_path, words):
    file = with_bad_lines(tmp_path, good, bad)
    samples, report = load_samples(file, words, 8, sft=False, max_bad_fraction=allowed)
    half = good // 2
    assert [ids[1] for ids, _ in rows(samples)] == [A] * half + [B] * (good - half)
    assert report.lines == good + bad
    if bad:
        assert f"{bad} of {good + bad} lines left out: {file}:{half + 1}: " in str(report)
        assert f'{file}:{half + 1}: "text" is 5, not a text' in str(report)
    else:
        assert "left out" not in str(report)


@pytest.mark.parametrize(("allowed", "good", "bad"), [(0.01, 98, 1), (0.4, 5, 5), (0, 99, 1), (0.039, 96, 4)])
def test_too_many_bad_lines_are_refused_with_their_places(allowed, good, bad, tmp_path, words):
    file = with_bad_lines(tmp_path, good, bad)
    with pytest.raises(UserError) as refusal:
        load_samples(file, words, 8, sft=False, max_bad_fraction=allowed, field="eval_file")
    heading = f"eval_file: {bad} of {good + bad} lines cannot be used, more than max_bad_fraction {allowed:g} allows"
    assert str(refusal.value).startswith(heading)
    for place in range(bad):
        assert f"{file}:{good // 2 + place + 1}: " in str(refusal.value)


def test_half_an_object_is_no_line_of_chats(write, words):
    """A chat of another order is a bad line as any other: counted, named, left out."""
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = write(*[good] * 99, {"messages": good["messages"][::-1]})
    samples, report = load_samples(file, words, 64, sft=True)
    assert len(samples) == 99
    assert f'1 of 100 lines left out: {file}:100: "messages": assistant, user; user and assistant must' in str(report)
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
            r"refuses a conversation \(no system, please\)",
        ),
        (PLAIN_TEMPLATE.replace("m.content }}", "m.content + (' a' if loop.last else '') }}"), "spells earlier turns"),
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


# --- files of tokens ---

TOKENS = [[A, B, C], [], [D], [E, A, B, C, D, E]]


@pytest.fixture
def tokens(tmp_path, words):
    def write(bos: str = "each", eos: str = "each", tokenizer=words) -> str:
        write_tokens(tmp_path / "t.bin", iter(TOKENS), tokenizer, name="words", bos=bos, eos=eos, overwrite=True)
        return str(tmp_path / "t.bin")

    return write


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
    assert [row["input_ids"][1] for row in islice(stream, 15)] == found  # from the start again, as a resumed run does
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
    with pytest.raises(UserError, match=r"lines cannot be used, more than max_bad_fraction 0\.01 allows") as refusal:
        seen.extend(stream)
    assert len(seen) < 2000
    assert f"{tmp_path / 'long.jsonl'}:801: " in str(refusal.value)
    file = with_bad_lines(tmp_path, 50, 1)
    with pytest.raises(UserError, match="1 of 51 lines cannot be used"):
        list(islice(load_samples(file, words, 8, sft=False, streaming=True)[0], 100))
    patient, _ = load_samples(file, words, 8, sft=False, streaming=True, max_bad_fraction=0.02)
    assert len(list(islice(patient, 100))) == 100


def test_a_stream_without_anything_to_learn_ends(write, words):
    stream, _ = load_samples(write(*texts("", "  ")), words, 8, sft=False, streaming=True)
    with pytest.raises(UserError, match=r"train_file: .*data\.jsonl: nothing to learn in it"):
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
