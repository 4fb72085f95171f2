"""What the experiments' models are used for: pass keys, long instructions, continuations as pictures."""

import json
import random
from itertools import islice

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from transformers import AutoTokenizer

from component.data import IGNORE_INDEX
from component.data.chat_template import encode_chat
from component.data.document import SampleOptions, encode_file
from component.data.sample import WHOLE, RecordTally, fit
from component.error import UserError
from component.evaluate.passkey import NEEDLE, PromptMaker, draw_key
from component.storage.result import save_figure
from component.tokenizer import load_tokenizer
from script.evaluate.passkey_model import make_tokenizer
from script.experiment.downstream.instructions import end_of_question
from script.experiment.downstream.passages import passages
from script.experiment.downstream.passkey import write_samples
from script.experiment.downstream.passkey_samples import spelling_end_to_end, training_samples
from script.experiment.downstream.split import SHARED_LINE, documents, split
from script.experiment.downstream.transcript import DPI, MARGIN, WIDTH, Block, Measure, draw

EXPERIMENT = "script/experiment/downstream/"
DEMO_BASE = "script/demo/base"  # a tokenizer that learnt from real texts; its pieces are words
WORDS = ["the", "of", "and", "a", "to", "in", "he", "was", "his", "that", "it", "with", "as", "had", "for", "on"]


@pytest.fixture(params=["demo", "digits", "tiny"])
def any_tokenizer(request, tokenizer_folder):
    if request.param == "digits":
        return make_tokenizer()
    return AutoTokenizer.from_pretrained(DEMO_BASE if request.param == "demo" else tokenizer_folder)


@pytest.fixture
def tokenizer_folder(base_folder):
    return base_folder


class Flags:
    """Those that samples depend on."""

    steps, tokens_per_step = 4, 1024
    lengths, depths, trials, seed = [320, 384], 2, 3, 42


def test_pass_keys_are_learnt_in_the_very_tokens_that_are_measured(any_tokenizer, tmp_path):
    any_tokenizer.save_pretrained(tmp_path / "model")
    folder = spelling_end_to_end(tmp_path / "model", tmp_path / "copy")
    tokenizer, file = load_tokenizer(str(folder)), tmp_path / "train.jsonl"
    maker, longest = PromptMaker(load_tokenizer(str(tmp_path / "model"))), 512
    told = write_samples(folder, file, longest, Flags)
    options = SampleOptions(longest, sft=True, template="tokenizer")
    encoded = list(encode_file(file, tokenizer, options, RecordTally()))  # as train.py reads the file
    assert len(encoded) == told["samples"] > 5
    assert Flags.steps * Flags.tokens_per_step <= sum(len(ids) for ids, _ in encoded)
    lengths = set()
    for ids, labels in encoded:
        assert next(fit(ids, labels, options, tokenizer))["fate"] == WHOLE
        learnt = [at for at, label in enumerate(labels) if label != IGNORE_INDEX]
        key = tokenizer.decode([ids[at] for at in learnt]).split()[0]
        answer, again = maker.tokens_of(f" {key}."), maker.tokens_of(f" {key}")
        prompt = ids[: -len(answer)]
        needle = maker.tokens_of(NEEDLE.format(key=key))
        start = next(at for at in range(len(ids)) if ids[at : at + len(needle)] == needle)
        filler = len(prompt) - len(maker.start) - len(needle) - len(maker.question)
        measured = maker.prompt(len(prompt), (start - len(maker.start)) / filler, key)
        assert (prompt, ids[len(prompt) :], start) == (measured.ids, answer, measured.needle_start)
        said_again = measured.needle_end - len(maker.tokens_of(f" {key} is the pass key."))
        assert learnt == [*range(said_again, said_again + len(again)), *range(len(prompt), len(ids))]
        lengths.add(len(prompt))
    assert min(lengths) < 400 < max(lengths) <= longest, "short ones and long ones"


def test_no_key_that_is_measured_is_trained_on():
    folder_tokenizer = make_tokenizer()
    folder_tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    free = list(training_samples(folder_tokenizer, 20_000, 256, set(), 1))
    keys = {turns[0][1].strip() for turns in free}
    banned = set(sorted(keys)[::2])
    kept = {turns[0][1].strip() for turns in training_samples(folder_tokenizer, 20_000, 256, banned, 1)}
    assert len(banned) > 20
    assert not kept & banned
    assert len(draw_key(42, 256, 0.5, 0)) == 5


def test_a_tokenizer_that_reads_prompts_otherwise_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}{{ message.content }}{% endfor %}"
    with pytest.raises(UserError, match="--base"):
        list(training_samples(tokenizer, 10_000, 256, set(), 1))
    with pytest.raises(UserError, match="--context: 64"):
        list(training_samples(tokenizer, 10_000, 64, set(), 1))


def text_of(draw: random.Random, words: int) -> str:
    return "\n".join(" ".join(draw.choices(WORDS, k=20)) for _ in range(words // 20))


def test_a_document_is_on_one_side_only():
    draw, records = random.Random(0), []
    for number in range(60):
        text = text_of(draw, 400)
        for question in range(draw.randint(1, 4)):
            frame = ("{}\n\n{}", "Read this:\n{}\n{}", "{1}\n{0}")[question % 3]
            records.append({"input": frame.format(text, f"Question {question}?"), "output": "a", "of": str(number)})
    draw.shuffle(records)
    groups = documents(records)
    assert sorted(len({record["of"] for record in group}) for group in groups) == [1] * 60
    for seed in range(5):
        sides = split(groups, 0.2, seed)
        held, trained = ({record["of"] for group in sides[side] for record in group} for side in ("held_out", "train"))
        assert not held & trained
        assert held | trained == {str(number) for number in range(60)}
        count = sum(map(len, sides["held_out"]))
        assert 0.15 * len(records) < count <= 0.2 * len(records)
    assert split(groups, 0.2, 1) == split(groups, 0.2, 1) != split(groups, 0.2, 2)


def test_documents_hang_together_along_a_chain():
    one, two, three = ("x" * SHARED_LINE, "y" * SHARED_LINE, "z" * (SHARED_LINE - 1))
    texts = [one, f"{three}\n{two}", three, f" {one} \n{two}"]
    found = documents([{"input": text, "output": ""} for text in texts])
    assert sorted(len(group) for group in found) == [1, 3], "short lines say nothing"
    with pytest.raises(UserError, match="--held_out"):
        split(found[:1], 0.5, 0)


def test_the_end_of_a_question_is_kept_and_the_answer_is_the_same():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    record = {"input": text_of(random.Random(1), 800) + "\n\nWho was it?", "output": "It was he."}
    cut = end_of_question(tokenizer, record, 256)
    assert record["input"].endswith(cut["input"])
    (ids, labels), (_, whole) = (encode_chat(tokenizer, [(r["input"], r["output"])]) for r in (cut, record))
    assert 250 <= len(ids) <= 256
    learnt, of_whole = ([label for label in found if label != IGNORE_INDEX] for found in (labels, whole))
    assert learnt == of_whole
    assert end_of_question(tokenizer, cut, 256) == cut


def test_passages_are_pieces_of_the_book(tmp_path):
    tokenizer, draw = AutoTokenizer.from_pretrained(DEMO_BASE, model_max_length=10**9), random.Random(2)
    sentences = (" ".join(draw.choices(WORDS, k=draw.randint(4, 30))) for _ in range(2000))
    book, file = "".join(f"{text}.{draw.choice((' ', chr(10)))}" for text in sentences), tmp_path / "books.jsonl"
    file.write_text(json.dumps({"id": "book", "text": book}) + "\n")
    found = list(islice(passages(file, tokenizer, (300, 600), 40, "1"), 8))
    for passage in found:
        at = book.index(passage["prompt"])
        assert book[at:].startswith(passage["prompt"] + passage["true"])
        assert book[at - 1] == "\n"
        assert passage["prompt"].endswith(".")
        assert 300 <= passage["tokens"] == len(tokenizer(passage["prompt"]).input_ids) <= 600
        assert abs(len(tokenizer(passage["true"], add_special_tokens=False).input_ids) - 40) <= 1
    assert found == list(islice(passages(file, tokenizer, (300, 600), 40, "1"), 8))
    with pytest.raises(UserError, match=r"--source.*900000 tokens"):
        next(passages(file, tokenizer, (300, 900_000), 40, "1"))
    file.write_text(json.dumps({"text": "no end " * 3000}) + "\n")
    with pytest.raises(UserError, match=r"--source.*sentences"):
        next(passages(file, tokenizer, (300, 600), 40, "1"))


def test_all_of_a_transcript_is_inside_its_picture(tmp_path):
    draw_words = random.Random(3)
    text = " ".join("".join(draw_words.choices("abcdefgh$_^{}\\ i", k=9)) for _ in range(150))
    unbroken = "W" * 400
    blocks = [
        Block("Before", text, "red", "a note"),
        Block("After", unbroken, "blue"),
        Block("True", "$5 & $6", "green"),
    ]
    figure = draw("A title " * 30, [[blocks[0]], blocks[:2], [], [blocks[2]]], "A caption. " * 60)
    file = tmp_path / "picture.png"
    save_figure(figure, file)
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    renderer, width = FigureCanvasAgg(figure).get_renderer(), WIDTH * DPI
    boxes = [(written.get_text(), written.get_window_extent(renderer)) for written in figure.texts]
    assert len(boxes) > 20
    for line, box in boxes:
        assert 0 < box.x0 < box.x1 <= width - 0.9 * MARGIN * DPI, line
        assert 0 < box.y0 < box.y1 < figure.get_figheight() * figure.dpi, line
    for number, (line, box) in enumerate(boxes):
        for other, beside in boxes[number + 1 :]:
            overlap = min(box.x1, beside.x1) - max(box.x0, beside.x0), min(box.y1, beside.y1) - max(box.y0, beside.y0)
            assert min(overlap) <= 0.5, (line, other)
    written = "".join(line for line, _ in boxes).replace(" ", "")
    assert written.count("W") == 400
    assert written.count(text.replace(" ", "")[:40]) == 2, "alone, and beside the other"


def test_text_is_wrapped_at_spaces():
    measure = Measure()
    lines = measure.wrap("one two\n three  four", measure.width("one two three"))
    assert lines == ["one two three", "four"]
    assert measure.wrap("", 1.0) == [""]


@pytest.mark.parametrize(
    ("program", "words", "parts"),
    [
        ("passkey", ["--steps", "0"], ["--steps", "0", "at least 1"]),
        ("passkey", ["--base", "/no/such"], ["--base", "/no/such"]),
        ("passkey", ["--lengths", "20"], ["--lengths", "20", "at least"]),
        ("passkey", ["--adapter", "a", "--context", "64"], ["--context", "64"]),
        ("passkey", ["--figure", "/no/such/f.png"], ["--figure", "/no/such"]),
        ("instructions", ["--held_out", "1"], ["--held_out", "1.0"]),
        ("instructions", ["--source", "/no/such"], ["--source", "/no/such"]),
        ("instructions", ["--per_document", "0"], ["--per_document", "at least 1"]),
        ("examples", ["--shown", "17"], ["--shown", "17", "16"]),
        ("examples", ["--long_tokens", "9", "3"], ["--long_tokens", "9, 3"]),
        ("examples", ["--long_tokens", "9", "3000"], ["--long_tokens", "3000", "64 tokens"]),
    ],
)
def test_mistakes(program, words, parts, run_program, base_folder, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    given = {"base": base_folder, "work": tmp_path / "work", "output_json": tmp_path / "found.json"}
    more = {
        "passkey": {"figure": tmp_path / "f.png"},
        "instructions": {"source": tmp_path / "texts.jsonl"},
        "examples": {"source": tmp_path / "texts.jsonl", "extended": base_folder}
        | {f"{kind}_figure": tmp_path / f"{kind}.png" for kind in ("long", "short")},
    }
    given = {f"--{name}": value for name, value in (given | more[program]).items()}
    given |= dict.fromkeys(words[:1])
    flags = [word for name, value in given.items() if value is not None for word in (name, value)]
    outcome = run_program(f"{EXPERIMENT}{program}.py", *flags, *words)
    assert outcome.status == 1, outcome.err
    assert all(part in outcome.err for part in parts), outcome.err
