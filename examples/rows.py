"""Rows of one's own: a function that yields mappings; `source: "function:examples/rows.py:products"` calls it."""

import random


def products(count=100, highest=9, seed=0):
    """`count` questions about products, the same for the same seed."""
    numbers = random.Random(seed)
    for _ in range(count):
        a, b = numbers.randint(2, highest), numbers.randint(2, highest)
        yield {"prompt": f"What is {a} times {b}? Answer with a number.", "answer": str(a * b)}
