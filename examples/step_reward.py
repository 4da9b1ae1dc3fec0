"""A reward for every step of an answer: a list with one number a step."""

from apportion.algorithms.steps import split_steps


def short_steps(completions, longest=200, **columns):
    """-1 for each step of more than `longest` characters."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [[-float(end - start > longest) for start, end in split_steps(text)] for text in texts]
