"""How does a question become a prompt that fills a length?"""

import random

import pytest
from transformers import AutoTokenizer

from component.data.chat_template import SYSTEM
from component.error import UserError
from component.evaluate.ruler_prompt import COMPLETION, SampleMaker, most_units
from component.evaluate.ruler_task import TASKS
from tests.words import write_lines

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(params=["bytes", "the demo's"])
def any_tokenizer(request, tokenizer):
    if request.param == "bytes":
        return tokenizer
    return AutoTokenizer.from_pretrained("script/demo/base", model_max_length=10**9)


def maker(tokenizer, template=COMPLETION, seed=42, haystack=None, longest=16384) -> SampleMaker:
    return SampleMaker(tokenizer, template, seed, haystack, longest)


def shortest(making: SampleMaker, task: str) -> int:
    """The shortest length for sample 0, as the refusal says."""
    with pytest.raises(UserError, match=f"--lengths: 40 tokens are too few for {task};") as refused:
        making.sample(task, 40, 0)
    return int(str(refused.value).split("needs about ")[1].split(",")[0])


class TestLength:
    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("over", [0, 7, 500])
    def test_one_more_unit_would_not_fit(self, over, task, any_tokenizer):
        """From the shortest length on; the prompt with one more unit is made here."""
        making = maker(any_tokenizer)
        length = shortest(making, task) + over + 40
        found = making.sample(task, length, 0)
        assert len(found.ids) + found.answer_tokens <= length
        units = units_of(making, task, length, found.ids)
        more = making.prompt_ids(making.question(task, length, 0, units + 1))
        assert len(more) + found.answer_tokens > length

    @pytest.mark.parametrize("task", TASKS)
    def test_at_published_lengths(self, task):
        """With the demo's tokenizer: filled but for the length of a unit."""
        making = maker(AutoTokenizer.from_pretrained("script/demo/base", model_max_length=10**9))
        for length in (4096, 16384):
            found = making.sample(task, length, 3)
            assert 0 <= length - len(found.ids) - found.answer_tokens < 100

    @pytest.mark.parametrize("task", TASKS)
    def test_the_shortest(self, task, tokenizer):
        making = maker(tokenizer)
        length = shortest(making, task)
        with pytest.raises(UserError, match=f"{length}, answer included"):
            making.check(task, 40, 1)
        if task not in ("fwe", "cwe"):  # their samples depend on the length
            assert len(making.sample(task, length + 60, 0).ids) <= length + 60
            making.check(task, 2 * length, 5)

    def test_a_sample_that_does_not_fit_is_found_whatever_its_number(self, tokenizer):
        """Keys differ in length, so a first sample may fit where a later one does not."""
        making, seen = maker(tokenizer), 0
        for length in range(490, 530):
            made = (making.question("niah_multiquery", length, number, 4) for number in range(6))
            needed = [len(making.prompt_ids(question)) + 128 for question in made]
            if needed[0] <= length < max(needed):
                seen += 1
                with pytest.raises(UserError, match=f"--lengths: {length} tokens are too few"):
                    making.check("niah_multiquery", length, 6)
            elif max(needed) <= length:
                making.check("niah_multiquery", length, 6)
        assert seen


def units_of(making: SampleMaker, task: str, length: int, ids: list[int]) -> int:
    """The number of units that gives these ids, by trying all."""
    for units in range(TASKS[task].least, 20_000):
        if making.prompt_ids(making.question(task, length, 0, units)) == ids:
            following = making.prompt_ids(making.question(task, length, 0, units + 1))
            if following != ids:
                return units
    raise AssertionError("no number of units gives this prompt")


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_depends_on_its_seed_length_and_number_alone(task, tokenizer):
    length = 3000
    one = maker(tokenizer).sample(task, length, 2)
    other = maker(tokenizer, longest=9000)
    other.sample(task, length, 0)
    other.sample(task, length + 500, 2)
    assert other.sample(task, length, 2) == one
    differing = [
        maker(tokenizer, seed=43).sample(task, length, 2),
        other.sample(task, length, 3),
        other.sample(task, length + 500, 2),
    ]
    assert len({tuple(found.references) for found in [one, *differing]}) == 4


@pytest.mark.parametrize("task", TASKS)
def test_the_prompt_is_the_question_and_the_beginning_of_its_answer(task, tokenizer):
    making = maker(tokenizer)
    found = making.sample(task, 4000, 1)
    text = tokenizer.decode(found.ids)
    assert text.startswith("<s>")
    assert text.count("<s>") == 1
    assert text.endswith((" is", " are", ":"))
    missing = [one for one in found.references if one not in text]
    assert not missing


def test_without_an_end_of_sequence_token(tokenizer, monkeypatch):
    """Some tokenizers append one to every text."""
    making = maker(tokenizer)
    plain = making.prompt_ids(making.question("vt", 4096, 0, 9))
    from component.evaluate import ruler_prompt

    ids_of = ruler_prompt.text_ids
    monkeypatch.setattr(ruler_prompt, "text_ids", lambda *words, **more: [*ids_of(*words, **more), 1])
    assert making.prompt_ids(making.question("vt", 4096, 0, 9)) == plain


class TestChat:
    def test_by_the_tokenizers_template(self, tokenizer):
        tokenizer.chat_template = CHATML
        making = maker(tokenizer, "tokenizer")
        question = making.question("vt", 4096, 0, 9)
        assert tokenizer.decode(making.prompt_ids(question)) == (
            f"<|user|>{question.text}\n<|assistant|>{question.prefix}"
        )
        assert len(making.sample("vt", 4000, 0).ids) + 30 <= 4000

    def test_by_vicunas(self, tokenizer):
        making = maker(tokenizer, "vicuna")
        question = making.question("cwe", 2048, 0, 12)
        assert tokenizer.decode(making.prompt_ids(question)) == (
            f"{SYSTEM}\nUSER: {question.text}\nASSISTANT: {question.prefix}"
        )


def test_special_tokens_of_a_haystack_are_text(tokenizer, tmp_path):
    file = write_lines(tmp_path / "h.jsonl", {"text": "He wrote </s> and <s> here. " * 400})
    found = maker(tokenizer, haystack=str(file), longest=3000).sample("niah_single_2", 3000, 0)
    assert "</s>" in tokenizer.decode(found.ids)
    assert 1 not in found.ids
    assert found.ids.count(0) == 1


@pytest.mark.parametrize("seed", range(20))
def test_most_units_of_any_growth(seed):
    """Compared with counting up; tokens that jump, stand still, and begin with a large part."""
    draw = random.Random(seed)
    start, each = draw.randint(0, 200), draw.choice([(1, 1), (0, 3), (5, 60), (20, 20)])
    sizes = [start]
    for _ in range(3000):
        sizes.append(sizes[-1] + draw.randint(*each))
    for room in (sizes[5], sizes[5] + 1, sizes[100], sizes[700] - 1, sizes[1200]):
        fitting = [units for units, size in enumerate(sizes) if size <= room]
        found = most_units(lambda units: sizes[min(units, 3000)], room, 3, 2500)
        assert found == min(max(fitting), 2500)


def test_most_units_asks_few_times():
    asked = []

    def tokens(units: int) -> int:
        asked.append(units)
        return 100 + 21 * units

    assert most_units(tokens, 131_072, 1, None) == (131_072 - 100) // 21
    assert len(asked) <= 6
