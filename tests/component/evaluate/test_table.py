"""How are perplexities printed?"""

from component.evaluate.aggregate import Document, PositionBucket
from component.evaluate.perplexity import Perplexity
from component.evaluate.table import comparison, document_line, length_table, no_key_tokens, position_table


def result(seq_len: int, perplexity: float, **changes) -> Perplexity:
    buckets = [
        PositionBucket(0, seq_len // 2, 3, 1.0, perplexity),
        PositionBucket(seq_len // 2, seq_len, changes.pop("last", 4), 1.0, perplexity / 2),
    ]
    return Perplexity(
        "longlora", seq_len, 64, 10, 12345, 1.5, perplexity, buckets, [], 1, 2.0, 5120.0, None, None
    )  # fmt: skip


def test_a_row_per_length():
    assert length_table([result(256, 7.15459), result(2048, 35.0)]).splitlines() == [
        "seq_len  stride  windows  tokens scored    loss  perplexity  tokens/s",
        "256          64       10         12,345  1.5000      7.1546     5,120",
        "2048         64       10         12,345  1.5000     35.0000     5,120",
    ]


def test_a_row_per_model():
    assert comparison(
        {"base": [result(256, 7.0), result(2048, 35.5)], "ours": [result(256, 8.0), result(2048, 6.25)]}
    ) == (
        "perplexity at a window of     256     2048\n"
        "base                       7.0000  35.5000\n"
        "ours                       8.0000   6.2500"
    )


def test_positions_of_the_longest_windows():
    """Buckets without scored tokens are left out."""
    both = {"base": [result(256, 7.0), result(2048, 35.5)], "ours": [result(2048, 6.25)]}
    assert position_table(both) == (
        "at positions of windows of 2048     base    ours\n"
        "0-1023                           35.5000  6.2500\n"
        "1024-2047                        17.7500  3.1250"
    )
    assert len(position_table({"x": [result(256, 7.0, last=0)]}).splitlines()) == 2


def test_documents():
    documents = [Document(place, 0, 5, 0.0, value) for place, value in ((0, 4.0), (2, 9.5), (7, 3.0))]
    assert document_line("ours", documents) == (
        "ours by document: 3 documents, from 3.0000 (document 7) over 4.0000 (median) to 9.5000 (document 2)"
    )


def test_long_ppl_beside_perplexity():
    some, none = result(256, 7.15459), result(128, 35.0)
    some.long_ppl, some.key_tokens, some.key_token_share = 3.25, 1234, 0.09996
    none.key_tokens, none.key_token_share = 0, 0.0
    assert length_table([none, some]).splitlines() == [
        "seq_len  stride  windows  tokens scored    loss  perplexity  tokens/s  LongPPL  key tokens    share",
        "128          64       10         12,345  1.5000     35.0000     5,120        -           0   0.00 %",
        "256          64       10         12,345  1.5000      7.1546     5,120   3.2500       1,234  10.00 %",
    ]
    assert comparison({"base": [none, some], "ours": [none, some]}).splitlines()[4:] == [
        "LongPPL at a window of  128     256",
        "base                      -  3.2500",
        "ours                      -  3.2500",
    ]


def test_why_there_is_no_long_ppl():
    results = [result(length, 7.0) for length in (63, 64, 65, 66)]
    for found in results[:3]:
        found.key_tokens = 0
    results[3].key_tokens = 1
    assert no_key_tokens(results, 64).splitlines() == [
        "no LongPPL at seq_len 63: the first 64 tokens of a window can't be key",
        "no LongPPL at seq_len 64: the first 64 tokens of a window can't be key",
        "no LongPPL at seq_len 65: no token is key",
    ]
    assert no_key_tokens(results[3:], 64) == ""
    assert no_key_tokens([result(256, 7.0)], 64) == "", "not looked for"
