"""Passages, and their tokens in a prompt."""

SYSTEM = "Answer from the passages."
PASSAGES = [
    ("wind", "The wind was strong.\n\nIt came from the west."),
    ("rain", "Rain fell all day"),
    ("snow", "Snow stayed on the hills (above 900 m) until June!"),
]


def runs(prompt):
    return {each["id"]: prompt.token_ids[each["start"] : each["end"]] for each in prompt.documents}
