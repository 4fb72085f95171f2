"""Up to which length can a model use its context? RULER's tasks, scores and effective length (arXiv 2404.06654)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from component.data.text import text_ids
from component.distributed.sequence import sequence_group
from component.distributed.world import own_share
from component.evaluate.ruler_prompt import Sample, SampleMaker
from component.evaluate.split import continue_greedily
from component.evaluate.table import grid
from component.inference.batch import greedy_batch
from component.loading import end_ids

# LLaMA2-7B's mean scores at 4096 tokens, the published thresholds: of chat models (table 3), of base models (table 12)
THRESHOLDS = {"chat models": 0.856, "base models": 0.794}
ROUNDING = 1e-9  # of means: 0.6 is 0.8 of 0.75, though not in floating point
Answer = Callable[[list[Sample]], list[str]]


@dataclass
class Trial:
    length: int  # requested tokens, answer included
    task: str
    sample: int
    prompt_tokens: int
    references: list[str]
    answer: str
    score: float


def score(answer: str, references: list[str]) -> float:
    """The share of `references` that the answer contains, in upper or lower case: the published string_match_all."""
    return fmean(reference.lower() in answer.lower() for reference in references)


def run_cell(
    maker: SampleMaker, task: str, length: int, samples: int, batch_size: int, answer: Answer
) -> Iterator[list[Trial]]:
    """Yield the trials of this process, of one task at one length, batch by batch."""
    own = own_share(list(range(samples)))
    for first in range(0, len(own), batch_size):
        numbers = own[first : first + batch_size]
        made = [maker.sample(task, length, number) for number in numbers]
        yield [
            Trial(length, task, number, len(one.ids), one.references, text, score(text, one.references))
            for number, one, text in zip(numbers, made, answer(made), strict=True)
        ]


def model_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Answer:
    """Greedy answers of a model, alone or in a batch, or by all processes of a sequence group."""

    def answer(samples: list[Sample]) -> list[str]:
        most = samples[0].answer_tokens
        if sequence_group():
            drafts = [text_ids(tokenizer, f" {', '.join(one.references)}.") for one in samples]
            ends = set(end_ids(model))
            pairs = zip(samples, drafts, strict=True)
            found = [continue_greedily(model, one.ids, most, draft, ends) for one, draft in pairs]
        else:
            found = greedy_batch(model, tokenizer, [one.ids for one in samples], most)
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]

    return answer


def table_of(trials: list[Trial], tasks: list[str], lengths: list[int]) -> list[list[float]]:
    """Mean scores: a row per task, a column per length."""
    cells: dict[tuple[str, int], list[float]] = {}
    for trial in trials:
        cells.setdefault((trial.task, trial.length), []).append(trial.score)
    return [[fmean(cells[task, length]) for length in lengths] for task in tasks]


def effective_length(means: list[float], lengths: list[int], threshold: float) -> int | None:
    """The longest of the ascending `lengths` up to which no mean is below `threshold`; None if the first one is."""
    found = None
    for length, mean in zip(lengths, means, strict=True):
        if mean < threshold - ROUNDING:
            break
        found = length
    return found


def summary(scores: list[list[float]], lengths: list[int], share: float) -> dict:
    """Means over the tasks, each relative to the shortest length's (None if that is 0), and effective lengths.

    Args:
        scores: a row per task, a column per length, in ascending order.
        share: of the mean at the shortest length, for the second effective length.
    """
    means = [fmean(column) for column in zip(*scores, strict=True)]
    bars = {f"RULER's threshold for {kind}": threshold for kind, threshold in THRESHOLDS.items()}
    if means[0]:
        bars[f"{share:g} of the mean at {lengths[0]} tokens"] = share * means[0]
    return {
        "means": means,
        "relative_to_shortest": [mean / means[0] for mean in means] if means[0] else [None] * len(means),
        "effective_length": [
            {"by": name, "threshold": threshold, "tokens": effective_length(means, lengths, threshold)}
            for name, threshold in bars.items()
        ],
    }


def report(scores: list[list[float]], tasks: list[str], lengths: list[int], found: dict) -> str:
    """The table of scores, with means and effective lengths below."""
    rows = [[task, *(f"{100 * score:.1f}" for score in row)] for task, row in zip(tasks, scores, strict=True)]
    rows.append(["mean", *(f"{100 * mean:.1f}" for mean in found["means"])])
    relative = ["-" if ratio is None else f"{ratio:.2f}" for ratio in found["relative_to_shortest"]]
    rows.append(["relative to the shortest", *relative])
    lines = []
    for bar in found["effective_length"]:
        tokens = f"{bar['tokens']} tokens" if bar["tokens"] else f"below {lengths[0]} tokens"
        lines.append(f"effective length by {bar['by']} ({100 * bar['threshold']:.1f}): {tokens}")
    return "\n".join([grid(["score in % at tokens of", *map(str, lengths)], rows), *lines])
