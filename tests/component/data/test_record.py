"""Which fields of a record are read? Every one is understood, refused by name, or listed; expectations by hand."""

import json

import pytest

from component.data.dataset import load_samples
from component.data.reader import parse_object
from component.data.record import chat_problem, ignored_fields, read_chat, text_fields_problem
from component.error import UserError

USER, BOT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def bot(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("record", "turns", "system"),
    [
        # K1a: Alpaca, as LLaMA-Factory and axolotl read it
        (
            {"instruction": "Reverse these words.", "input": "one two three", "output": "three two one"},
            [("Reverse these words.\n\none two three", "three two one")],
            None,
        ),
        ({"instruction": "Sing.", "input": "", "output": "La."}, [("Sing.", "La.")], None),
        ({"instruction": "Sing.", "output": "La."}, [("Sing.", "La.")], None),
        # said already by the input's first or last lines, not just by some words of it
        ({"instruction": "Sing.", "input": "Sing.\nLoud.", "output": "La."}, [("Sing.\nLoud.", "La.")], None),
        ({"instruction": "Who? ", "input": "A story.\nWho?\n", "output": "I"}, [("A story.\nWho?", "I")], None),
        ({"instruction": "Sing.", "input": "Sing.", "output": "La."}, [("Sing.", "La.")], None),
        (
            {"instruction": "Sing.\r\nNow.", "input": "Sing. \nNow.\r\nB", "output": "A"},
            [("Sing. \nNow.\r\nB", "A")],
            None,
        ),
        ({"instruction": "Sing", "input": "Singing", "output": "La."}, [("Sing\n\nSinging", "La.")], None),
        ({"instruction": "b", "input": "a\nb\nc", "output": "A"}, [("b\n\na\nb\nc", "A")], None),
        ({"instruction": "", "input": "Q", "output": "A"}, [("Q", "A")], None),
        ({"instruction": None, "input": "Q", "output": "A"}, [("Q", "A")], None),
        # K1b: system prompts
        ({"system": "In French.", "conversations": [USER, BOT]}, [("Q", "A")], "In French."),
        ({"system": "In French.", "messages": [USER, BOT]}, [("Q", "A")], "In French."),
        ({"system_prompt": "In French.", "input": "Q", "output": "A"}, [("Q", "A")], "In French."),
        ({"system": "", "messages": [SYSTEM, USER, BOT]}, [("Q", "A")], "S"),
        ({"system": "S ", "messages": [SYSTEM, USER, BOT]}, [("Q", "A")], "S "),
        ({"system": "S", "instruction": "I", "input": "Q", "output": "A"}, [("I\n\nQ", "A")], "S"),
        # earlier turns
        (
            {"history": [["a", "b"], ["c", "d"]], "input": "Q", "output": "A"},
            [("a", "b"), ("c", "d"), ("Q", "A")],
            None,
        ),
        ({"history": [], "input": "Q", "output": "A"}, [("Q", "A")], None),
        # fields that change nothing
        ({"id": 7, "source": "books", "input": "Q", "output": "A"}, [("Q", "A")], None),
        ({"weight": 1, "input": "Q", "output": "A", "tools": [], "chosen": None}, [("Q", "A")], None),
        ({"messages": [{**USER, "weight": None}, {**BOT, "weight": 1, "train": True}]}, [("Q", "A")], None),
    ],
)
def test_understood(record, turns, system):
    assert read_chat(record) == (turns, system)
    assert chat_problem(record) is None


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"input": "Q", "output": "A", "chosen": "B"}, '"chosen" would be ignored'),
        ({"input": "Q", "output": "A", "rejected": "B"}, '"rejected" would be ignored'),
        ({"input": "Q", "output": "A", "context": "C"}, '"context" would be ignored'),
        ({"input": "Q", "output": "A", "document": "A book."}, '"document" would be ignored'),
        ({"input": "Q", "output": "A", "documents": ["Q", "D"]}, '"documents" would be ignored'),
        ({"input": "Can he?", "output": "A", "context": "C"}, '"context" would be ignored'),
        ({"input": "Q", "output": "A", "question": "Q2"}, '"question" would be ignored'),
        ({"input": "Q", "output": "A", "weight": 0.5}, '"weight" would be ignored'),
        ({"input": "Q", "output": "A", "weight": 0}, '"weight" would be ignored'),
        ({"input": "Q", "output": "A", "images": ["a.png"]}, '"images" would be ignored'),
        ({"messages": [USER, BOT], "tools": [{"name": "f"}]}, '"tools" would be ignored'),
        ({"messages": [USER, {**BOT, "weight": 0}]}, 'message 2: "weight" would be ignored'),
        ({"messages": [USER, {**BOT, "train": False}]}, 'message 2: "train" would be ignored'),
        ({"messages": [USER, {**BOT, "tool_calls": [{}]}]}, 'message 2: "tool_calls" would be ignored'),
        ({"messages": [USER, {**BOT, "reasoning_content": "R"}]}, 'message 2: "reasoning_content" would be ignored'),
        ({"messages": [USER, BOT], "system": "T", "input": "Q"}, '"input" beside "messages"'),
        ({"messages": [USER, BOT], "instruction": "I"}, '"instruction" beside "messages"'),
        ({"messages": [USER, BOT], "conversations": [USER, BOT]}, '"messages" beside "conversations"'),
        ({"messages": [SYSTEM, USER, BOT], "system": "T"}, '"system" and a system message that differs'),
        ({"system": "S", "system_prompt": "T", "input": "Q", "output": "A"}, '"system" and "system_prompt" differ'),
        ({"history": ["a"], "input": "Q", "output": "A"}, '"history" is not a list of [question, answer]'),
        ({"history": [["a", 5]], "input": "Q", "output": "A"}, '"history" is not a list of [question, answer]'),
        ({"system": 5, "input": "Q", "output": "A"}, '"system" is 5, not a text'),
        ({"messages": [USER, {**BOT, "content": " "}, USER, BOT]}, "answer 1 is empty, but a later one is not"),
        ({"instruction": "I", "output": "A", "input": 5}, '"input" is 5, not a text'),
        ({"prompt": "Q", "completion": "A"}, '"prompt" would be ignored: write "input"'),
        ({"text": "Q"}, 'no "input" (its keys: text)'),
        # K1: other names and other letters of fields that change training
        ({"Instruction": "I", "input": "Q", "output": "A"}, '"Instruction" would be ignored: write "instruction"'),
        ({"System": "S", "input": "Q", "output": "A"}, '"System" would be ignored: write "system"'),
        ({"Chosen": "C", "input": "Q", "output": "A"}, '"Chosen" would be ignored: preference data'),
        ({"system_message": "S", "input": "Q", "output": "A"}, '"system_message" would be ignored: write "system"'),
        ({"documents": ["D"], "input": "Q", "output": "A"}, '"documents" would be ignored: put it into "input"'),
        ({"messages": [USER, {**BOT, "training": False}]}, 'message 2: "training" would be ignored'),
    ],
)
def test_refused(record, problem):
    assert problem in str(chat_problem(record))
    with pytest.raises(ValueError, match=r"\w"):
        read_chat(record)


@pytest.mark.parametrize(
    "more",
    [
        {"document": "0"},
        {"document": 17},
        {"context": "The hills are far. "},
        {"context": "he"} | {"input": "The hills; he walks.", "output": "x"},
        {"context": " "},
        {"question": "Who walks?", "answer": "We"},
        {"train": True, "weight": 1.0},
    ],
    ids=str,
)
def test_nothing_is_lost_without_these_fields(more):
    record = {"input": "The hills are far. Who walks?", "output": "We do."}
    record |= {key: more[key] for key in more if key in record}
    assert read_chat(record | more) == read_chat(record)


def test_a_prompt_beside_its_messages():
    """As in UltraChat and No Robots."""
    record = {"messages": [USER, BOT], "prompt": "Q", "prompt_id": "f0e1"}
    assert read_chat(record) == read_chat({"messages": [USER, BOT]})
    assert '"prompt" would be ignored' in str(chat_problem(record | {"prompt": "Another"}))


def test_weights_of_questions():
    """As in OpenHermes: what is not trained on may have the weight 0."""
    asked, answered = {"from": "human", "value": "Q", "weight": 0.0}, {"from": "gpt", "value": "A", "weight": 1.0}
    record = {"conversations": [asked, answered]}
    assert read_chat(record)[0] == [("Q", "A")]
    assert read_chat({"conversations": [asked | {"weight": 1}, answered]})[0] == [("Q", "A")]
    record = {"conversations": [asked, answered | {"weight": 0.0}]}
    assert '"weight" would be ignored' in str(chat_problem(record))
    record = {"messages": [SYSTEM | {"train": False}, USER | {"train": False}, BOT | {"train": True}]}
    assert read_chat(record) == ([("Q", "A")], "S")
    assert '"weight" would be ignored' in str(chat_problem({"messages": [USER | {"weight": 0.5}, BOT]}))


def test_fields_of_texts():
    assert text_fields_problem({"text": "a", "id": 1, "prompt": "p", "labels": None}) is None
    assert "weight" in str(text_fields_problem({"text": "a", "weight": 0.1}))
    assert "labels" in str(text_fields_problem({"text": "a", "labels": [1, 2]}))


def test_ignored_fields():
    assert ignored_fields({"input": "Q", "output": "A", "id": 1, "lang": "de"}, sft=True) == {"id", "lang"}
    assert ignored_fields({"text": "a", "input": "Q", "url": "u"}, sft=False) == {"input", "url"}


def test_the_summary_lists_what_is_not_used_and_names_what_is_refused(tokenizer, tmp_path, own_cache):
    file = tmp_path / "chats.jsonl"
    lines = [{"input": "Q", "output": "A", "id": n, **({"topic": "t"} if n < 3 else {})} for n in range(5)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, report = load_samples(str(file), tokenizer, 400, sft=True)
    assert "fields not used: id (5), topic (3)" in str(report)
    file.write_text(json.dumps({"input": "Q", "output": "A", "context": "C"}) + "\n")
    with pytest.raises(UserError, match=r'chats.jsonl:1: "context" would be ignored: put it into "input"'):
        load_samples(str(file), tokenizer, 400, sft=True)


TWICE = "is there 2 times, with different values; keep one of them"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"input": "Q", "input": "R", "output": "A"}', f'"input" {TWICE}'),
        ('{"input": "Q", "output": "A", "output": ""}', f'"output" {TWICE}'),
        ('{"input": "Q", "output": "A", "system": "x", "system": "y"}', f'"system" {TWICE}'),
        ('{"messages": [{"role": "user", "content": "Q"}], "messages": []}', f'"messages" {TWICE}'),
        ('{"messages": [{"role": "user", "content": "Q", "content": "R"}, {"role": "bot", "content": "A"}]}',
         f'"messages": the content of message 1 {TWICE}'),
        ('{"input": "Q", "output": "A", "weight": 0, "weight": 1}', '"weight" would be ignored'),
        ('{"input": "Q", "output": "A", "id": 1, "id": 2, "input": "Q"}', None),
    ],
)  # fmt: skip
def test_a_field_that_is_there_twice(line, problem):
    found = chat_problem(json.loads(line, object_pairs_hook=parse_object))
    assert found is problem is None or found.startswith(problem)


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"input": "Yes or no?", "output": "no", "answer": "yes"}, "answer"),
        ({"messages": [user("Paris or Rome?"), bot("Rome")], "response": "Paris"}, "response"),
        ({"input": "Q", "output": "The sky is blue.", "context": "The sky is blue."}, "context"),
        ({"messages": [user("Q"), bot("P")], "prompt": "P"}, "prompt"),
        ({"input": "Which?", "output": "x", "options": ["x", "y"]}, "options"),
        ({"input": "Sum up.", "output": "x", "article": "Long."}, "article"),
        ({"input": "Q", "output": "A", "think": "Hm."}, "think"),
        ({"input": "Q", "output": "A", "sample_weight": 0.2}, "sample_weight"),
    ],
)
def test_the_other_side_does_not_say_it(record, field):
    """A question that offers an answer does not give it, and an answer is no context."""
    assert chat_problem(record).startswith(f'"{field}" would be ignored: ')


@pytest.mark.parametrize(
    "record",
    [
        {"input": "Which, x or y?", "output": "x", "options": ["x", "y"], "answers": ["x"]},
        {"messages": [{"role": "system", "content": "P"}, user("Q"), bot("A")], "prompt": "P", "completion": "A"},
    ],
)
def test_its_own_side_says_it(record):
    assert chat_problem(record) is None
