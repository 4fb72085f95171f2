"""Up to which length can a model use its context? Scores, means and effective lengths, worked out by hand."""

import pytest

from component.error import UserError
from component.evaluate.ruler import (
    THRESHOLDS,
    Trial,
    effective_length,
    model_answer,
    report,
    run_cell,
    score,
    summary,
    table_of,
)
from component.evaluate.ruler_prompt import Sample, SampleMaker
from tests.conftest import build_llama
from tests.reference.greedy import stock


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        (" 1234567.", ["1234567"], 1.0),
        ("12345678", ["1234567"], 1.0),  # contained: published
        ("123456", ["1234567"], 0.0),
        ("ABCDE, fghij", ["abcde", "FGHIJ", "klmno", "pqrst"], 0.5),
        ("b a", ["a", "b"], 1.0),
        ("", ["a"], 0.0),
        ("1. stone\n2. river", ["river", "stone", "cloud"], 2 / 3),
    ],
)
def test_the_share_of_references_in_the_answer(answer, references, expected):
    assert score(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("means", "threshold", "expected"),
    [
        ([0.9, 0.86, 0.85], 0.856, 8192),
        ([0.856, 0.5, 0.9], 0.856, 4096),  # a later success does not count
        ([0.8, 0.9, 0.9], 0.856, None),
        ([0.9, 0.9, 0.9], 0.856, 16384),
        ([0.75, 0.6, 0.5], 0.8 * 0.75, 8192),  # 0.6000000000000001
    ],
)
def test_effective_length(means, threshold, expected):
    assert effective_length(means, [4096, 8192, 16384], threshold) == expected


def test_table_and_summary():
    trials = [Trial(length, task, sample, 0, [], "", points) for length, task, sample, points in [
        (100, "vt", 0, 1.0), (100, "vt", 1, 0.8), (200, "vt", 0, 0.5), (200, "vt", 1, 0.7),
        (100, "cwe", 0, 0.9), (100, "cwe", 1, 0.9), (200, "cwe", 0, 0.8), (200, "cwe", 1, 0.8),
    ]]  # fmt: skip
    scores = table_of(trials, ["cwe", "vt"], [100, 200])
    assert scores == [[pytest.approx(0.9), pytest.approx(0.8)], [pytest.approx(0.9), pytest.approx(0.6)]]
    found = summary(scores, [100, 200], 0.75)
    assert found["means"] == pytest.approx([0.9, 0.7])
    assert found["relative_to_shortest"] == pytest.approx([1.0, 7 / 9])
    assert [(bar["by"], bar["threshold"], bar["tokens"]) for bar in found["effective_length"]] == [
        ("RULER's threshold for chat models", 0.856, 100),
        ("RULER's threshold for base models", 0.794, 100),
        ("0.75 of the mean at 100 tokens", pytest.approx(0.675), 200),
    ]
    assert summary(scores, [100, 200], 0.8)["effective_length"][-1]["tokens"] == 100
    assert report(scores, ["cwe", "vt"], [100, 200], found).splitlines() == [
        "score in % at tokens of    100   200",
        "cwe                       90.0  80.0",
        "vt                        90.0  60.0",
        "mean                      90.0  70.0",
        "relative to the shortest  1.00  0.78",
        "effective length by RULER's threshold for chat models (85.6): 100 tokens",
        "effective length by RULER's threshold for base models (79.4): 100 tokens",
        "effective length by 0.75 of the mean at 100 tokens (67.5): 200 tokens",
    ]


def test_a_model_without_any_success_has_no_effective_length():
    found = summary([[0.0, 0.0]], [100, 200], 0.8)
    assert found["relative_to_shortest"] == [None, None]
    assert [bar["tokens"] for bar in found["effective_length"]] == [None, None]
    assert report([[0.0, 0.0]], ["vt"], [100, 200], found).endswith("base models (79.4): below 100 tokens")
    assert len(THRESHOLDS) == 2


class TestTrials:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
    def test_the_references_as_answers_score_1(self, batch_size, tokenizer):
        """Every sample once, in order, in batches."""
        maker = SampleMaker(tokenizer, "completion", 1, None, 1500)
        batches = list(
            run_cell(
                maker, "niah_multivalue", 1500, 5, batch_size, lambda made: [", ".join(m.references) for m in made]
            )
        )
        assert [len(batch) for batch in batches] == [min(batch_size, 5 - at) for at in range(0, 5, batch_size)]
        trials = [trial for batch in batches for trial in batch]
        assert [(t.sample, t.task, t.length, t.score) for t in trials] == [
            (number, "niah_multivalue", 1500, 1.0) for number in range(5)
        ]
        for trial in trials:
            made = maker.sample("niah_multivalue", 1500, trial.sample)
            assert (trial.prompt_tokens, trial.references) == (len(made.ids), made.references)
        assert [t.prompt_tokens <= 1500 - 128 for t in trials] == [True] * 5

    def test_wrong_answers_score_less(self, tokenizer):
        maker = SampleMaker(tokenizer, "completion", 1, None, 1500)
        (trials,) = run_cell(maker, "niah_multivalue", 1500, 2, 2, lambda made: [made[0].references[0], "no"])
        assert [trial.score for trial in trials] == [0.25, 0.0]


class TestAnswers:
    def test_answers_in_a_batch_are_those_of_each_alone(self, tiny_llama, tokenizer):
        """Compared with Hugging Face, one prompt at a time, beyond the model's 64 positions."""
        prompts = [[0] + [5] * 40, [0, *range(20, 100)], [0, 9, 9]]
        answers = model_answer(tiny_llama, tokenizer)([Sample(ids, [], 12) for ids in prompts])
        assert answers == [
            tokenizer.decode(stock(tiny_llama, ids, max_new_tokens=12), skip_special_tokens=True) for ids in prompts
        ]
        assert len(set(answers)) == 3

    def test_dynamic_positions_are_refused_in_a_batch(self, tiny_llama_config, tokenizer):
        theta = tiny_llama_config.rope_parameters["rope_theta"]
        tiny_llama_config.rope_parameters = {"rope_type": "dynamic", "rope_theta": theta, "factor": 2.0}
        answer = model_answer(build_llama(tiny_llama_config).eval(), tokenizer)
        assert len(answer([Sample([0, 5], [], 3)])) == 1
        with pytest.raises(UserError, match="--batch_size"):
            answer([Sample([0, 5], [], 3), Sample([0, 5, 6], [], 3)])
