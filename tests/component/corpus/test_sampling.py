"""Which texts are chosen? Those of the lowest keys: compared with sorting, and with what chance would give."""

import random

import numpy as np

from component.corpus.sampling import first_of_each, lowest, sample_key, text_hash


def test_hashes_are_of_whole_texts():
    assert text_hash("a") == "e4e97ca07ff48bfd2f4a4fef6d3b0f0f"
    assert (
        len(
            {
                text_hash("a"),
                text_hash("a "),
                text_hash("a", ""),
                text_hash("", "a"),
                text_hash("ab"),
                text_hash("a", "b"),
            }
        )
        == 6
    )


def test_seed_and_purpose_change_the_key():
    hashed = text_hash("a")
    assert sample_key(hashed, 1) == sample_key(hashed, 1)
    assert len({sample_key(hashed, 1), sample_key(hashed, 2), sample_key(hashed, 1, "order")}) == 3


def test_the_lowest_as_sorting_gives_them_whatever_the_order():
    drawn = random.Random(0)
    keys = [drawn.randrange(1000) for _ in range(600)]
    for count in (0, 1, 10, 300, 10_000):
        first = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        expected = dict(sorted(first.items())[:count])
        assert lowest(((key, place) for place, key in enumerate(keys)), count) == expected
        assert set(lowest(((key, place) for place, key in reversed(list(enumerate(keys)))), count)) == set(expected)


def test_each_text_is_as_likely_as_any_other():
    hashes = [text_hash(str(number)) for number in range(20)]
    times = np.zeros(20)
    for seed in range(1000):
        times[list(lowest(((sample_key(hashed, seed), at) for at, hashed in enumerate(hashes)), 5).values())] += 1
    assert times.sum() == 5000
    assert 195 < times.min() <= times.max() < 305  # 250 expected, 13.7 is a standard deviation


def test_the_first_of_equal_texts():
    hashes = [text_hash(text) for text in ("a", "b", "a", "c", "b", "a")]
    assert first_of_each(hashes, 6).tolist() == [True, True, False, True, False, False]
    assert first_of_each([], 0).tolist() == []
