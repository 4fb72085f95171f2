"""How does a published record become a question and its answer? Records in the published shapes, literally."""

import pytest

from component.corpus.mapping import PRESETS, mapping_of, render, template_problem

PAGE = ["<P>", "Google", "was", "founded", "in", "1998", "by", "Larry", "Page", "and", "Sergey", "Brin", ".", "</P>"]
PROMPT = (
    "Google was founded in 1998 by Larry Page and Sergey Brin .\n\n"
    "Answer the question from the text above.\nQuestion: who founded google"
)
LONG = {"start_token": 0, "end_token": 14}
SHORT = [{"start_token": 7, "end_token": 9}, {"start_token": 10, "end_token": 12}]


def simplified(**annotation) -> dict:
    given = {"long_answer": LONG, "short_answers": [], "yes_no_answer": "NONE"} | annotation
    return {"question_text": "who founded google", "document_text": " ".join(PAGE), "annotations": [given]}


def on_the_hub(**annotation) -> dict:
    """As parquet holds it: objects of lists for lists of objects."""
    given = {
        "long_answer": LONG,
        "short_answers": {"start_token": [], "end_token": []},
        "yes_no_answer": -1,
    } | annotation
    tokens = {"token": PAGE, "is_html": [word.startswith("<") for word in PAGE]}
    return {
        "document": {"title": "Google", "tokens": tokens},
        "question": {"text": "who founded google", "tokens": ["who", "founded", "google"]},
        "annotations": {name: [value] for name, value in given.items()},
    }


BRIN = "Larry Page, Sergey Brin"
WHOLE = "Google was founded in 1998 by Larry Page and Sergey Brin ."
RECORDS = {
    "input_output": ({"input": " a ", "output": "b\n"}, [("a", "b")]),
    "alpaca": ({"instruction": "Do it.", "input": "", "output": "Done.", "file": "x"}, [("Do it.", "Done.")]),
    "alpaca with input": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        [("Add.\n\n1, 2", "3")],
    ),
    "alpaca without input": ({"instruction": "Do it.", "output": "Done."}, [("Do it.", "Done.")]),
    "evol_instruct": ({"instruction": "Write.", "output": "Text"}, [("Write.", "Text")]),
    "booksum": (
        {"bid": 27681, "chapter": "It was a night.", "summary_text": "A night.", "summary_analysis": ""},
        [("Write a summary of the following chapter of a book.\n\nIt was a night.\n\nSummary:", "A night.")],
    ),
    "conversations": (
        {
            "idx": "x",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": " Hi "},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "Bye"},
                {"from": "gpt", "value": "Farewell"},
            ],
        },
        [("Hi", "Hello"), ("Bye", "Farewell")],
        "Be brief.",
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        [("Hi", "Hello")],
    ),
    "natural_questions short": (simplified(short_answers=SHORT), [(PROMPT, BRIN)]),
    "natural_questions yes": (simplified(yes_no_answer="YES"), [(PROMPT, "Yes")]),
    "natural_questions long": (simplified(), [(PROMPT, WHOLE)]),
    "natural_questions none": (simplified(long_answer={"start_token": -1, "end_token": -1}), [(PROMPT, "")]),
    "natural_questions hub": (
        on_the_hub(short_answers={"start_token": [7, 10], "end_token": [9, 12], "text": ["", ""]}),
        [(PROMPT, BRIN)],
    ),
    "natural_questions hub no": (on_the_hub(yes_no_answer=0), [(PROMPT, "No")]),
    "natural_questions hub long": (on_the_hub(), [(PROMPT, WHOLE)]),
}


@pytest.mark.parametrize("name", RECORDS)
def test_published_shapes(name):
    record, turns, *system = RECORDS[name]
    assert PRESETS[name.split()[0]](record) == (turns, system[0] if system else None)


@pytest.mark.parametrize("user", ["user", "human", "prompter", "Human", "USER"])
def test_names_of_the_user(user):
    told = [{"from": user, "value": "Q"}, {"from": "gpt", "value": "A"}]
    said = [{"role": user, "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert PRESETS["conversations"]({"conversations": told}) == ([("Q", "A")], None)
    assert PRESETS["messages"]({"messages": said}) == ([("Q", "A")], None)


@pytest.mark.parametrize("bot", ["assistant", "gpt", "chatgpt", "bot", "bard", "model", "Assistant", "GPT"])
def test_names_of_the_assistant(bot):
    told = [{"from": "human", "value": "Q"}, {"from": bot, "value": "A"}]
    said = [{"role": "user", "content": "Q"}, {"role": bot, "content": "A"}]
    assert PRESETS["conversations"]({"conversations": told}) == ([("Q", "A")], None)
    assert PRESETS["messages"]({"messages": said}) == ([("Q", "A")], None)


def test_keys_of_both_kinds_as_tables_mix_them():
    said = [
        {"role": "user", "value": "Q", "from": None, "content": None},
        {"role": None, "from": "gpt", "content": "A", "value": None},
    ]
    assert PRESETS["messages"]({"messages": said, "conversations": None}) == ([("Q", "A")], None)


def test_templates_of_a_yaml():
    mapping = mapping_of({"input": "{a.b}\n{{x}} {c?}{d.e?}", "output": "{f}"})
    assert mapping({"a": {"b": "deep"}, "c": None, "d": "no object", "f": " answer "}) == (
        [("deep\n{x}", "answer")],
        None,
    )


WRONG = {
    "input_output": ({"text": "a"}, r'no "input" \(its keys: text\)'),
    "alpaca": ({"instruction": 5, "output": "a"}, '"instruction" is 5, not a text'),
    "conversations": ({"text": "a"}, r'no list "conversations" or "messages" \(its keys: text\)'),
    "conversations empty": ({"conversations": []}, '"conversations" is not a list of messages'),
    "conversations odd": ({"conversations": [{"from": "human", "value": "a"}]}, '"conversations": user; must be'),
    "messages order": (
        {"messages": [{"role": role, "content": "a"} for role in ("assistant", "user")]},
        '"messages": assistant, user; user and assistant must take turns, beginning with the user',
    ),
    "messages text": ({"messages": ["a"]}, '"messages": message 1 needs "role"'),
    "messages keys": ({"messages": [{"role": "user"}]}, '"messages": message 1 needs "role"'),
    "booksum null": ({"chapter": "a", "summary_text": None}, '"summary_text" is null, not a text'),
    "natural_questions": ({"question": {"text": "a"}}, 'no "document.tokens" and no "document_text"'),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_shapes_are_told(name):
    record, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        PRESETS[name.split()[0]](record)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{a}", None),
        ("{a.b} {c?} {{", None),
        (5, "5 is not a string"),
        ("plain", "'plain' names no {field}"),
        ("{a", "'{a': expected '}' before end of string; write {{ for a brace"),
        ("{}", "'{}': only {field}, {nested.field} and {field?} are supported"),
        ("{a:>5}", "'{a:>5}': only {field}, {nested.field} and {field?} are supported"),
    ],
)
def test_templates_are_checked(template, problem):
    assert template_problem(template) == problem


def test_a_brace_in_a_record_is_no_field():
    assert render("{a}", {"a": "{b}"}) == "{b}"
