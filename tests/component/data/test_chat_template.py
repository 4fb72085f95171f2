"""How is a chat prompt spelt? Letter by letter as in the original project's component/dataset.py and chat.py."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from component.data.chat_template import encode_by_tokenizer, encode_chat, encode_conversation, prompt_ids
from component.data.record import chat_problem, read_chat
from component.error import UserError
from tests.conftest import ROOT

ORIGINAL = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.\nUSER: {input}\nASSISTANT: "
)


def test_an_open_prompt_is_the_originals(tokenizer):
    ids, labels = encode_chat(tokenizer, [("How long is a book?", None)])
    text = ORIGINAL.format(input="How long is a book?")
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer(text, add_special_tokens=False).input_ids, "in one piece, without <s>"
    assert labels == [-100] * len(ids)


def test_a_training_sample_is_the_originals(tokenizer):
    """component/dataset.py there: prompt and answer are tokenized apart, and the end-of-sequence token follows."""
    ids, labels = encode_chat(tokenizer, [("How long?", "Long enough.")])
    prompt = tokenizer(ORIGINAL.format(input="How long?"), add_special_tokens=False).input_ids
    answer = [*tokenizer("Long enough.", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert ids == prompt + answer
    assert labels == [-100] * len(prompt) + answer


def test_white_space_around_texts_is_no_part_of_them(tokenizer):
    assert encode_chat(tokenizer, [("\n How? ", " So.\n")]) == encode_chat(tokenizer, [("How?", "So.")])


def test_several_turns(tokenizer):
    ids, labels = encode_chat(tokenizer, [("One?", "First."), ("Two?", "Second."), ("Three?", None)])
    opening = ORIGINAL.format(input="One?")
    assert tokenizer.decode(ids) == (
        f"{opening}First.</s>\nUSER: Two?\nASSISTANT: Second.</s>\nUSER: Three?\nASSISTANT: "
    )
    learnt = [label for label in labels if label != -100]
    assert tokenizer.decode(learnt) == "First.</s>Second.</s>"
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))


@pytest.mark.parametrize("answered", [1, 2])
def test_a_conversation_only_grows(answered, tokenizer):
    turns = [("One?", "First."), ("Two?", "Second.")][:answered]
    before, _ = encode_chat(tokenizer, turns)
    after, _ = encode_chat(tokenizer, [*turns, ("And then?", None)])
    assert after[: len(before)] == before
    assert len(after) > len(before)


def test_braces_in_a_question_are_text(tokenizer):
    ids, _ = encode_chat(tokenizer, [("What does {input} mean in {}?", None)])
    assert "USER: What does {input} mean in {}?\n" in tokenizer.decode(ids)


# --- chats of several turns, as they stand in files ---


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def bot(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("record", "turns", "system"),
    [
        ({"input": "Q", "output": "A"}, [("Q", "A")], None),
        ({"input": "", "output": "A"}, [("", "A")], None),
        ({"input": "Q", "output": " \n"}, [], None),
        ({"messages": [user("Q"), bot("A")]}, [("Q", "A")], None),
        ({"messages": [{"role": "system", "content": "S"}, user("Q"), bot("A")]}, [("Q", "A")], "S"),
        ({"messages": [user("Q"), bot("A"), user("R"), bot("B")]}, [("Q", "A"), ("R", "B")], None),
        ({"messages": [user("Q"), bot("A"), user("R")]}, [("Q", "A")], None),
        ({"messages": [user("Q")]}, [], None),
        ({"messages": [user("Q"), bot("A"), user("R"), bot(" ")]}, [("Q", "A")], None),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "Q"},
                    {"from": "gpt", "value": "A"},
                    {"from": "user", "value": "R"},
                    {"from": "chatgpt", "value": "B"},
                    {"from": "human", "value": "T"},
                    {"from": "bot", "value": "C"},
                ],
                "id": 7,
            },
            [("Q", "A"), ("R", "B"), ("T", "C")],
            "S",
        ),
        ({"conversations": [user("Q"), {"role": "model", "content": "A"}]}, [("Q", "A")], None),
        ({"messages": None, "conversations": [user("Q"), bot("A")]}, [("Q", "A")], None),
        ({"messages": None, "input": "Q", "output": "A"}, [("Q", "A")], None),
    ],
)
def test_turns_of_a_record(record, turns, system):
    assert chat_problem(record) is None
    assert read_chat(record) == (turns, system)


@pytest.mark.parametrize("name", ["user", "human", "prompter", "Human", "USER"])
def test_names_of_the_user(name):
    told = {"conversations": [{"from": name, "value": "Q"}, {"from": "gpt", "value": "A"}]}
    said = {"messages": [{"role": name, "content": "Q"}, bot("A")]}
    for record in (told, said):
        assert chat_problem(record) is None
        assert read_chat(record) == ([("Q", "A")], None)


@pytest.mark.parametrize("name", ["assistant", "gpt", "chatgpt", "bot", "bard", "model", "Assistant", "GPT"])
def test_names_of_the_assistant(name):
    told = {"conversations": [{"from": "human", "value": "Q"}, {"from": name, "value": "A"}]}
    said = {"messages": [user("Q"), {"role": name, "content": "A"}]}
    for record in (told, said):
        assert chat_problem(record) is None
        assert read_chat(record) == ([("Q", "A")], None)


def test_keys_of_both_kinds_as_tables_mix_them():
    said = [
        {"role": "user", "value": "Q", "from": None, "content": None},
        {"role": None, "from": "gpt", "content": "A", "value": None},
    ]
    assert chat_problem({"messages": said}) is None
    assert read_chat({"messages": said}) == ([("Q", "A")], None)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": []}, '"messages" is not a list of messages'),
        ({"messages": "Q"}, '"messages" is not a list of messages'),
        ({"conversations": None}, '"conversations" is not a list of messages'),
        ({"messages": [bot("A")]}, "assistant; user and assistant must take turns, beginning with the user"),
        ({"messages": [user("Q"), user("R"), bot("A")]}, "user, user, assistant; user and assistant must"),
        ({"messages": [user("Q"), bot("A"), bot("B")]}, "user, assistant, assistant; user and assistant must"),
        ({"messages": [user("Q"), {"role": "system", "content": "S"}, bot("A")]}, "user, system, assistant; "),
        ({"messages": [{"role": "system", "content": "S"}]}, "system; user and assistant must"),
        ({"messages": [user("Q"), {"role": "tool", "content": "A"}]}, "message 2 needs"),
        ({"messages": [user("Q"), {"content": "A"}]}, "message 2 needs"),
        ({"messages": [user("Q"), {"role": "assistant"}]}, "message 2 needs"),
        ({"messages": [user("Q"), {"role": "assistant", "content": None}]}, "message 2 needs"),
        ({"messages": [user("Q"), {"role": "assistant", "content": [{"text": "A"}]}]}, "content of message 2 is"),
        ({"messages": [user("Q"), {"role": ["assistant"], "content": "A"}]}, "message 2 needs"),
        ({"messages": [user("\ud83d")]}, "content of message 1 holds half a character"),
        ({"messages": [user("a\0b")]}, "content of message 1 is not text: it has a zero byte at 1"),
        ({"messages": ["role"]}, "message 1 needs"),
        ({"messages": [None]}, "message 1 needs"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt-4", "value": "A"}]}, "message 2 needs"),
        ({"input": "Q"}, 'no "output" (its keys: input)'),
        ({"input": "Q", "output": 5}, '"output" is 5, not a text'),
        ({"text": "Q"}, 'no "input" (its keys: text)'),
    ],
)
def test_what_is_wrong_with_a_chat(record, problem):
    assert problem in chat_problem(record)


def test_every_answer_of_a_chat_is_learnt(tokenizer):
    turns, system = read_chat(
        {
            "messages": [
                {"role": "system", "content": " Be brief.\n"},
                user("One?"),
                bot("First."),
                user("Two?"),
                bot("2"),
            ]
        }
    )
    ids, labels = encode_conversation(tokenizer, turns, system, "vicuna")
    assert tokenizer.decode(ids) == "Be brief.\nUSER: One?\nASSISTANT: First.</s>\nUSER: Two?\nASSISTANT: 2</s>"
    assert runs(tokenizer, labels) == ["First.</s>", "2</s>"]


def runs(tokenizer, labels: list[int]) -> list[str]:
    """The texts of the stretches that are learnt."""
    found: list[list[int]] = [[]]
    for label in labels:
        if label != -100:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(run) for run in found if run]


# --- the tokenizer's own template ---

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CODE = "def f():\n        return    1\n\n    # naïve 東京"
CONVERSATIONS = {
    "one turn": ([("How long?", "Long enough.")], None),
    "several turns": ([("One?", "First."), ("Two?", "Second, and last."), ("", "3")], None),
    "a system text": ([("One?", "First.")], "Be brief."),
    "blanks": ([("  Q \n", CODE), ("Again:", "A  \n\n")], "\n"),
    "an answer that looks like a prompt": ([("Q", "user\nassistant\nA"), ("assistant", "A")], None),
    "the same answer twice": ([("A", "A"), ("A", "A")], None),
}


def chatml(trim_offsets: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen (which does not trim offsets) and Llama 3 (which does) have it, with blanks in tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([CODE, "How long? Long enough."] * 5, trainer)
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=CHATML)


def as_messages(turns, system) -> list[dict]:
    found = [] if system is None else [{"role": "system", "content": system}]
    return [*found, *(message for question, answer in turns for message in (user(question), bot(answer)))]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_templates_own_marks_say_the_same(name, trim_offsets):
    """transformers' mask of what stands between {% generation %} and {% endgeneration %}: answer and end, no more."""
    turns, system = CONVERSATIONS[name]
    ids, labels = encode_conversation(chatml(trim_offsets), turns, system, "tokenizer")
    marked = chatml(False).apply_chat_template(
        as_messages(turns, system), return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == marked["input_ids"]
    expected = [token if mask else -100 for token, mask in zip(ids, marked["assistant_masks"], strict=True)]
    assert labels == expected
    assert runs(chatml(False), labels) == [f"{answer}<|im_end|>" for _, answer in turns]


def test_a_chat_by_its_own_template_letter_by_letter():
    tokenizer = chatml(False)
    ids, _ = encode_conversation(tokenizer, [("One?", "First."), ("Two?", "2")], "Be brief.", "tokenizer")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nFirst."
        "<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    )


def test_an_open_answer_is_left_to_the_model():
    """What a chat program asks: everything but the answer, which is to come."""
    tokenizer = chatml(False)
    ids, labels = encode_by_tokenizer(tokenizer, [("One?", "First."), ("Two?", None)])
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n")
    assert runs(tokenizer, labels) == ["First.<|im_end|>"]


FORGETFUL = (  # as templates that drop the thoughts of earlier answers
    "{% for message in messages %}{{ message.role + ': ' }}"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LATE_SYSTEM = (  # as Mistral's, which puts the system text in front of the last question
    "{% for message in messages %}"
    "{% if message.role == 'user' and loop.index0 >= messages|length - 2 %}{{ 'LAST ' }}{% endif %}"
    "{{ message.content + '<|im_end|>' }}{% endfor %}"
)


@pytest.mark.parametrize("template", [FORGETFUL, LATE_SYSTEM])
def test_a_template_that_rewrites_earlier_turns_is_refused(template):
    tokenizer = chatml(False)
    tokenizer.chat_template = template
    one = [("One?", "<think>Hm.</think>First.")]
    assert runs(tokenizer, encode_by_tokenizer(tokenizer, one)[1]) == ["<think>Hm.</think>First.<|im_end|>"]
    with pytest.raises(UserError, match=r"template: the chat template of .* changes earlier turns"):
        encode_by_tokenizer(tokenizer, [*one, ("Two?", "2")])


MISTRAL = (  # the system prompt stands in front of the last question
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set said = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set said = messages %}{% endif %}"
    "{% set last = said|selectattr('role', 'equalto', 'user')|list|last %}{% for message in said %}"
    "{% if message.role == 'user' %}{{ '<|im_start|>' + (system if message is sameas last else '') }}{% endif %}"
    "{{ message.content + ('' if message.role == 'user' else '<|im_end|>') }}{% endfor %}"
)


def test_a_later_question_may_change_earlier_turns_of_a_prompt():
    """Nothing is learnt from a prompt: it is what the template makes of the whole conversation."""
    tokenizer = chatml(False)
    tokenizer.chat_template = MISTRAL
    turns = [("One?", "First."), ("Two, <|im_end|>?", None)]
    ids = prompt_ids(tokenizer, turns, "Be brief.", "tokenizer")
    assert tokenizer.decode(ids) == "<|im_start|>One?First.<|im_end|><|im_start|>Be brief.\n\nTwo, <|im_end|>?"
    assert ids.count(tokenizer.eos_token_id) == 1, "what somebody wrote is text"
    answered = prompt_ids(tokenizer, [*turns[:1], ("Two?", "2")], "Be brief.", "tokenizer")
    assert tokenizer.decode(answered).endswith("<|im_start|>Be brief.\n\nTwo?2<|im_end|>")
    assert prompt_ids(tokenizer, [], "Be brief.", "tokenizer") == []


MISTRAL_LAST = (  # as version 0.3's: the system prompt is there only if the last message is a question
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set said = messages[1:] %}"
    "{% else %}{% set said = messages %}{% endif %}{% for message in said %}{% if message.role == 'user' %}"
    "{{ '<|im_start|>' + (system + '\n\n' if loop.last and system is defined else '') + message.content }}"
    "{% else %}{{ ' ' + message.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)


def test_a_system_prompt_that_is_left_out_once_a_question_is_answered():
    """What is learnt is what follows the prompt of the same question; a second answer would have another system."""
    tokenizer = chatml(False)
    tokenizer.chat_template = MISTRAL_LAST
    for question in ("One?", "What is <|im_end|>?"):
        ids, labels = encode_by_tokenizer(tokenizer, [(question, "First.")], "Be brief.")
        prompt = prompt_ids(tokenizer, [(question, None)], "Be brief.", "tokenizer")
        assert ids[: len(prompt)] == prompt
        assert tokenizer.decode(ids) == f"<|im_start|>Be brief.\n\n{question} First.<|im_end|>"
        assert runs(tokenizer, labels) == [" First.<|im_end|>"]
    turns = [("One?", "First."), ("Two?", "2")]
    assert runs(tokenizer, encode_by_tokenizer(tokenizer, turns)[1]) == [" First.<|im_end|>", " 2<|im_end|>"]
    with pytest.raises(UserError, match=r"conversations of one turn"):
        encode_by_tokenizer(tokenizer, turns, "Be brief.")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_prompt_has_the_ids_of_training(name, tokenizer):
    turns, system = CONVERSATIONS[name]
    turns = [*turns, ("And then?", None)]
    for own, template in ((chatml(True), "tokenizer"), (tokenizer, "vicuna")):
        assert prompt_ids(own, turns, system, template) == encode_conversation(own, turns, system, template)[0]


def test_a_template_that_refuses_a_conversation():
    tokenizer = chatml(False)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match=r"rejects a conversation \(System role not supported\)"):
        encode_by_tokenizer(tokenizer, [("One?", "First.")], "Be brief.")


def test_no_template_is_refused():
    tokenizer = chatml(False)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"template: tokenizer, but it has no chat template; use template: vicuna"):
        encode_by_tokenizer(tokenizer, [("One?", "First.")])


def test_nothing_answered_is_nothing():
    for template in ("vicuna", "tokenizer"):
        assert encode_conversation(chatml(False), [], "Be brief.", template) == ([], [])


def test_the_servers_template_spells_as_training_does(tokenizer):
    """Of earlier answers only the text is the same: there, tokens may join across the colon."""
    tokenizer.chat_template = (ROOT / "script/inference/vicuna.jinja").read_text()
    one = [{"role": "user", "content": " Größe?\n"}]
    spelt = tokenizer.apply_chat_template(one, tokenize=False)
    assert tokenizer(spelt, add_special_tokens=False).input_ids == encode_chat(tokenizer, [(" Größe?\n", None)])[0]
    more = [{"role": "system", "content": "Be brief."}, *one, {"role": "assistant", "content": "Yes."}, *one]
    text = tokenizer.apply_chat_template(more, tokenize=False)
    assert text == "Be brief.\nUSER: Größe?\nASSISTANT: Yes.</s>\nUSER: Größe?\nASSISTANT: "
    turns = [("Größe?", "Yes."), ("Größe?", None)]
    assert text == tokenizer.decode(encode_chat(tokenizer, turns, "Be brief.")[0])


def test_special_tokens_in_a_text_are_text(tokenizer):
    """K9b: </s> typed by somebody, or inside a document, became the token that ends an answer."""
    ids, labels = encode_chat(tokenizer, [("What is </s>?", "The end, </s>.")])
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids).count("</s>") == 3
    assert tokenizer("</s>", add_special_tokens=False).input_ids == [tokenizer.eos_token_id]  # untouched by it
    assert labels.count(tokenizer.eos_token_id) == 1
