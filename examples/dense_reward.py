"""A reward for every token: a list in place of a number."""


def price_of_length(completion_ids, free=8, price=0.01, **columns):
    """`price` is charged for each token after the first `free` ones, at the token itself."""
    return [[0.0 if place < free else -price for place in range(len(ids))] for ids in completion_ids]
