"""How do several web visitors chat with one model? One answer at a time, streamed, and stopped on request."""

import itertools
import threading
import time

import pytest
import torch

from component.data.chat_template import encode_chat
from component.error import UserError
from component.inference.engine import Engine
from component.inference.flags import chat_parser
from component.rope import extend_context
from tests.conftest import build_llama
from tests.generation_flags import flags
from tests.reference.greedy import stock

GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture
def engine(tiny_llama_config, tokenizer) -> Engine:
    extend_context(tiny_llama_config, 512)
    return Engine(build_llama(tiny_llama_config).eval(), tokenizer, flags())


def never() -> bool:
    return False


def test_an_answer_grows_and_is_kept(engine, tokenizer):
    conversation = engine.conversation()
    texts = [answer.text for answer in engine.answer(conversation, "One?", GREEDY, never)]
    ids = stock(engine.model, encode_chat(tokenizer, [("One?", None)])[0], max_new_tokens=12)
    assert texts[0] == ""
    assert texts[-1] == tokenizer.decode(ids, skip_special_tokens=True)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert conversation.turns == [("One?", texts[-1])]


def test_the_second_turn_knows_the_first(engine, tokenizer):
    conversation = engine.conversation()
    list(engine.answer(conversation, "One?", GREEDY, never))
    expected = stock(engine.model, conversation.prompt_ids("Two?"), max_new_tokens=12)
    *_, last = engine.answer(conversation, "Two?", GREEDY, never)
    assert last.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_template_and_system_prompt_of_the_program(engine, tokenizer):
    assert engine.conversation().template == "vicuna"
    engine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    engine.flags = chat_parser("").parse_args(["--template", "tokenizer", "--system", "Be brief."])
    asked = engine.conversation().prompt_ids("One?")
    assert asked == tokenizer("Be brief. One? ", add_special_tokens=False).input_ids


def test_stopped(engine):
    stop, conversation = threading.Event(), engine.conversation()
    for answer in engine.answer(conversation, "One?", {"do_sample": False, "max_new_tokens": 200}, stop.is_set):
        if answer.text:
            stop.set()
    assert len(engine.tokenizer.tokenize(answer.text)) < 150
    assert conversation.turns == [("One?", answer.text)], "a stopped answer is part of the conversation"


def test_updates_are_few_and_complete(engine, monkeypatch):
    """A browser that must render the chat at each of 100 tokens a second no longer reacts to its buttons."""
    words = [f"{number} " for number in range(100)]

    def write_all(model, tokenizer, prompt_ids, flags, write, **options):
        for word in words:
            write(word)
            time.sleep(0.005)

    monkeypatch.setattr("component.inference.engine.generate", write_all)
    monkeypatch.setattr("component.inference.engine.UPDATE_SECONDS", 0.1)
    start = time.monotonic()
    answers = [answer.text for answer in engine.answer(engine.conversation(), "One?", GREEDY, never)]
    at_most = (time.monotonic() - start) / 0.1 + 3  # the empty one, the first piece, the last
    assert answers[1].startswith("0 ")
    assert answers[-1] == "".join(words)
    assert 4 < len(answers) <= at_most


def test_interleaved_answers_equal_separate_ones(engine):
    settings = {**GREEDY, "repetition_penalty": 1.5}
    alone, both = (
        [engine.answer(engine.conversation(), text, settings, never) for text in ("One?", "The dog")] for _ in range(2)
    )
    expected = [list(answers)[-1].text for answers in alone]
    interleaved = zip(*itertools.zip_longest(*both), strict=True)
    assert [[answer.text for answer in answers if answer][-1] for answers in interleaved] == expected
    assert expected[0] != expected[1]


def test_only_one_generates_at_a_time(engine, monkeypatch):
    running, counts = [], []

    def slow_generate(*_, **__):
        running.append(1)
        counts.append(len(running))
        time.sleep(0.1)
        running.pop()

    monkeypatch.setattr("component.inference.engine.generate", slow_generate)
    visitors = [
        threading.Thread(target=lambda: list(engine.answer(engine.conversation(), "One?", GREEDY, never)))
        for _ in range(3)
    ]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert counts == [1, 1, 1]


def test_closing_the_iterator_stops_generation(engine, monkeypatch):
    calls, forward = [], engine.model.forward

    def counted(**kwargs):
        calls.append(1)
        time.sleep(0.005)
        return forward(**kwargs)

    monkeypatch.setattr(engine.model, "forward", counted)
    answers = engine.answer(engine.conversation(), "One?", {"do_sample": False, "max_new_tokens": 300}, never)
    next(answers)
    next(answers)
    answers.close()
    with engine.turn:  # the lock is released
        assert len(calls) < 100


def test_truncation_is_reported(engine):
    conversation = engine.conversation()
    conversation.documents.append("dog " * 1000)
    with pytest.raises(UserError, match=r"the prompt has \d{4} tokens, but the model's context is 512"):
        list(engine.answer(conversation, "One?", GREEDY, never))
    *_, last = engine.answer(conversation, "One?", {**GREEDY, "truncate": "middle"}, never)
    assert last.notice.endswith("tokens were cut (middle)")


def test_invalid_settings(engine):
    with pytest.raises(UserError, match="--temperature: 0; use"):
        list(engine.answer(engine.conversation(), "One?", {"temperature": 0}, never))


def test_an_error_reaches_the_visitor_and_releases_the_lock(engine, monkeypatch):
    def fail(**_):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            list(engine.answer(engine.conversation(), "One?", GREEDY, never))
    assert list(engine.answer(engine.conversation(), "One?", GREEDY, never))[-1].text


def test_k19_a_prefill_is_stopped_at_the_next_layer(engine):
    """After the first of two layers, the visitor is gone: the second is not computed, and the cache starts anew."""
    stop, computed = threading.Event(), []

    def leave(*_) -> None:
        computed.append(1)
        stop.set()

    for layer in engine.model.model.layers:
        layer.register_forward_hook(leave)
    conversation = engine.conversation()
    assert [answer.text for answer in engine.answer(conversation, "One?", GREEDY, stop.is_set)][-1] == ""
    assert len(computed) == 1
    assert conversation.turns == []
    assert engine.cache.nbytes == 0
    assert not any(layer._forward_pre_hooks for layer in engine.model.model.layers)
    assert [*engine.answer(conversation, "One?", GREEDY, never)][-1].text


def test_k19_who_left_while_waiting_is_not_answered(engine, monkeypatch):
    asked = []
    monkeypatch.setattr("component.inference.engine.generate", lambda *_, **__: asked.append(1))
    with engine.turn:
        answers = engine.answer(engine.conversation(), "One?", GREEDY, never)
        assert next(answers).is_waiting
        assert next(answers).is_waiting, "a heartbeat, at which the server notices who left"
        answers.close()
        while engine.places._value < 16:
            time.sleep(0.01)
    assert asked == []


def test_k19_not_more_than_16_wait(engine):
    with engine.turn:
        waiting = [engine.answer(engine.conversation(), "One?", GREEDY, never) for _ in range(17)]
        for answers in waiting:
            next(answers)
        for answers in waiting[:16]:
            next(answers)
        with pytest.raises(UserError, match="busy: 16 questions wait for their answers; ask again in a minute"):
            next(waiting[16])
        for answers in waiting:
            answers.close()


def test_k19_a_long_document_is_counted_in_parts(engine, tokenizer, monkeypatch):
    text = "The dog. " * 30
    expected = len(tokenizer(text, add_special_tokens=False).input_ids)
    assert engine.count_tokens(text, "a.txt") == expected
    monkeypatch.setattr("component.inference.engine.COUNTED_CHARACTERS", 90)
    assert engine.count_tokens(text, "a.txt") >= expected
