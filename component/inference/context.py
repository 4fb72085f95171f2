"""Which part of a prompt is kept when it is longer than the model's context?"""

TRUNCATIONS = ("middle", "left")


def fit_prompt(
    prompt_ids: list[int], context: int, max_new_tokens: int, truncate: str | None, opening: int = 0
) -> tuple[list[int], int]:
    """The tokens of a prompt that fit, and how many were cut.

    Room is left for the answer: `max_new_tokens`, but no more than a quarter of the context.

    Args:
        context: of the model, in tokens.
        truncate: `left` keeps the opening and the end, `middle` beginning and end alike; None cuts nothing.
        opening: tokens at the start that `left` keeps too: <s>, or what a chat begins with.
    """
    limit = context - min(max_new_tokens, max(context // 4, 1))
    excess = len(prompt_ids) - limit
    if truncate is None or excess <= 0:
        return prompt_ids, 0
    opening = min(opening, limit)
    first = max(opening, limit // 2) if truncate == "middle" else opening
    return prompt_ids[:first] + prompt_ids[first + excess :], excess
