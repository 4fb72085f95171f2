"""What does each of RULER's tasks ask? Answers are worked out again from the text alone."""

import re
from collections import Counter

import pytest

from component.evaluate.ruler_task import TASKS, Question
from component.evaluate.ruler_words import NOISE, generated_text

SEEDS = ["42 a", "42 b", "7"]
WORDS = generated_text(3000)
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NEEDLE = re.compile(rf"One of the secret (number|uuid)s of (\S+) is: (\d+|{UUID})\.")
NIAH = [name for name in TASKS if name.startswith("niah")]
# task: (needles that matter, answers, kind of value, pattern of keys)
PUBLISHED = {
    "niah_single_1": (1, 1, "number", r"[a-z]+-[a-z]+"),
    "niah_single_2": (1, 1, "number", r"[a-z]+-[a-z]+"),
    "niah_single_3": (1, 1, "uuid", r"[a-z]+-[a-z]+"),
    "niah_multikey_1": (4, 1, "number", r"[a-z]+-[a-z]+"),
    "niah_multikey_2": (21, 1, "number", r"[a-z]+-[a-z]+"),
    "niah_multikey_3": (21, 1, "uuid", UUID),
    "niah_multivalue": (4, 4, "number", r"[a-z]+-[a-z]+"),
    "niah_multiquery": (4, 4, "number", r"[a-z]+-[a-z]+"),
}


def ask(task: str, seed: str = "42 a", units: int = 20, length: int = 8192) -> Question:
    return TASKS[task].build(seed, units, length, WORDS)


def test_the_published_tasks_with_their_room_for_the_answer():
    assert {name: task.answer_tokens for name, task in TASKS.items()} == {
        **dict.fromkeys(PUBLISHED, 128),
        "vt": 30,
        "cwe": 120,
        "fwe": 50,
    }
    assert {name for name, task in TASKS.items() if task.uses_haystack} == {
        "niah_single_2",
        "niah_single_3",
        "niah_multikey_1",
        "niah_multivalue",
        "niah_multiquery",
    }


@pytest.mark.parametrize("task", TASKS)
def test_a_question_follows_from_its_seed_alone(task):
    units = max(TASKS[task].least, 20)
    assert ask(task, units=units) == ask(task, units=units)
    others = [ask(task, seed, units).references for seed in SEEDS]
    assert len(set(map(tuple, others))) == 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", NIAH)
class TestNeedles:
    def test_numbers_of_needles_and_values(self, task, seed):
        question = ask(task, seed)
        needles, answers, kind, key = PUBLISHED[task]
        found = NEEDLE.findall(question.text)
        assert len(found) == needles
        assert len(question.references) == len(set(question.references)) == answers
        assert {one[0] for one in found} == {kind}
        assert all(re.fullmatch(key, one[1]) for one in found)
        assert all(re.fullmatch(UUID if kind == "uuid" else r"[1-9]\d{6}", one[2]) for one in found)

    def test_the_references_are_the_values_of_the_keys_asked_for(self, task, seed):
        question = ask(task, seed)
        (asked,) = re.findall(
            r"(?:What is the|What are all the) secret \w+ of (.+) in the text above\?$", question.text
        )
        keys = asked.replace(", and ", ", ").split(", ")
        assert len(keys) == (4 if task == "niah_multiquery" else 1)
        hidden = [(key, value) for _, key, value in NEEDLE.findall(question.text)]
        assert sorted(question.references) == sorted(value for key, value in hidden if key in keys)
        by_key = {key: {value for name, value in hidden if name == key} for key in keys}
        count = len(question.references) // len(keys)
        groups = [set(question.references[at * count : (at + 1) * count]) for at in range(len(keys))]
        assert groups == [by_key[key] for key in keys], "in the order of the question"
        verb = "is" if len(question.references) == 1 else "are"
        assert re.fullmatch(rf"The secret \w+ of {re.escape(asked)} in the text {verb}", question.prefix)

    def test_without_its_needles_the_haystack_is_whole(self, task, seed):
        text = ask(task, seed, 200).text.split("\n", 1)[1].rsplit("\n", 1)[0]
        if TASKS[task].uses_haystack:
            kept = NEEDLE.sub("", text).split()
            assert kept == WORDS[:200]
        elif task == "niah_single_1":
            lines = text.split("\n")
            assert [line for line in lines if not NEEDLE.fullmatch(line)] == [NOISE] * 200
        else:
            assert all(NEEDLE.fullmatch(line) for line in text.split("\n"))
            assert text.count("\n") == 200

    def test_more_units_have_the_same_answers(self, task, seed):
        assert ask(task, seed, 20).references == ask(task, seed, 77).references


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_needles_are_everywhere(task):
    """Their places over many samples: all tenths of the text occur."""
    tenths = Counter()
    for seed in range(200):
        question = ask(task, str(seed), 300)
        text = question.text.split("\n", 1)[1].rsplit("\n", 1)[0]
        tenths[min(9, 10 * text.index(question.references[0]) // len(text))] += 1
    assert sorted(tenths) == list(range(10))
    assert max(tenths.values()) < 50


@pytest.mark.parametrize("ending", ["", '."', ".)", "\u3002"])
def test_needles_are_everywhere_in_texts_of_any_kind(ending):
    """Without sentences too, as in code: they come before a word then."""
    words = [f"word{at}" + ending * (at % 10 == 9) for at in range(600)]
    tenths = Counter()
    for seed in range(100):
        text = TASKS["niah_single_2"].build(str(seed), 600, 4096, words).text
        before = text[: text.index("One of the secret")].split()[-1]
        tenths[min(9, 10 * text.index("One of the secret") // len(text))] += 1
        assert not ending or before.endswith(ending) or tenths[0]
    assert sorted(tenths) == list(range(10))


@pytest.mark.parametrize("seed", SEEDS)
def test_needles_in_prose_are_between_sentences(seed):
    text = ask("niah_multikey_1", seed, 400).text.split("\n", 1)[1]
    before = [text[: found.start()] for found in NEEDLE.finditer(text)]
    assert all(part == "" or part.endswith(". ") for part in before)


def test_a_needle_task_word_for_word():
    question = TASKS["niah_single_1"].build("1", 1, 4096, [])
    key, value = NEEDLE.search(question.text)[2], question.references[0]
    assert question.text == (
        "A secret number is hidden in the following text. Remember it: a question at the end asks for it.\n"
        f"One of the secret numbers of {key} is: {value}.\n"
        "The river is wide. The boats are slow. The hills are far. We walk there. We walk back again.\n"
        f"What is the secret number of {key} in the text above?"
    )
    assert question.prefix == f"The secret number of {key} in the text is"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("units", [5, 6, 50])
def test_variables_are_those_at_the_end_of_the_chain(units, seed):
    question = ask("vt", seed, units)
    example, asked = question.text.split("\n\nThe following text hides", 1)
    for text, names, letters, lines in (
        (asked, question.references, 5, units),
        (example, example.rsplit(":", 1)[1].split(), 3, 10),
    ):
        values: dict[str, str] = {}
        for name, source in re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+)$", text, re.M):  # in order of the text
            values[name] = values.get(source, source)
        assert len(values) == 5, "one assignment and four hops"
        assert {len(name) for name in values} == {letters}
        (value,) = set(values.values())
        assert re.fullmatch(r"\d{5}", value)
        assert names == list(values)
        assert f"Which variables have the value {value} in" in text
        assert text.count(NOISE) == lines
    assert question.prefix.endswith(f"5 variables have the value {value_of(question.text)}:")


def value_of(text: str) -> str:
    return re.findall(r"have the value (\d+) in the text above\?$", text)[0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("length", "often"), [(4095, ((3, 1), (6, 1))), (4096, ((10, 3), (30, 3)))])
@pytest.mark.parametrize("units", [11, 60, 1000])
def test_common_words_by_counting(units, length, often, seed):
    question = ask("cwe", seed, units, length)
    example, asked = question.text.split("\nIn the numbered list", 1)
    answer = example.rsplit(" are: ", 1)[1]
    size = 20 if length < 4096 else 40
    for text, words, count, (most, least) in (
        (asked, question.references, units, often[1]),
        (example.removesuffix(answer), re.findall(r"\d+\. ([a-z]+)", answer), size, often[0]),
    ):
        listed = re.findall(r"(\d+)\. ([a-z]+)", text)
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert len(counts) == count
        assert {word for word, _ in counts.most_common(10)} == set(words)
        assert sorted(counts.values(), reverse=True) == [most] * 10 + [least] * (count - 10)
    assert answer.startswith("1. ")
    assert not set(question.references) <= set(answer.split()), "the example has other words"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("units", "length"), [(100, 500), (101, 4096), (1234, 4096), (9000, 32768)])
def test_frequent_words_by_counting(units, length, seed):
    question = ask("fwe", seed, units, length)
    text = question.text.split("frequent ones. ", 1)[1].split("\n")[0]
    counts = Counter(text.split(" "))
    ranked = counts.most_common()
    assert ranked[0][0] == "..."
    assert [word for word, _ in ranked[1:4]] == question.references
    assert ranked[3][1] > ranked[4][1], "the third is unique"
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
    zeta = sum(k**-2 for k in range(1, 200_000)) + 1 / 200_000
    expected = [int(units / zeta / rank**2) for rank in range(1, length // 50 + 1)]
    assert [count for _, count in ranked] == [count for count in expected if count]


@pytest.mark.parametrize("units", range(100, 400))
def test_the_third_word_is_always_more_frequent_than_the_fourth(units):
    text = ask("fwe", "0", units, 600).text.split("frequent ones. ", 1)[1].split("\n")[0]
    counts = [count for _, count in Counter(text.split(" ")).most_common()]
    assert len(set(counts[:5])) == 5
