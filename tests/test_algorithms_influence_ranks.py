"""A group whose responses two processes hold has the influences that one process gives it, over real collectives."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from apportion.algorithms.influence import GroupStates, group_influence, group_vocabulary, probabilities_on

LENGTHS = torch.tensor([5, 2, 7, 3])
CORRECT = torch.tensor([True, False, True, False])


def group(dtype=torch.float64):
    """Hidden states, an output head of 40 tokens, and token ids such that neither half has all of the group's."""
    generator = torch.Generator().manual_seed(7)
    tokens = int(LENGTHS.sum())
    hidden = torch.randn(tokens, 6, generator=generator, dtype=dtype)
    head = torch.randn(40, 6, generator=generator, dtype=dtype)
    ids = torch.randint(0, 30, (tokens,), generator=generator)
    ids[0], ids[-1] = 38, 39
    return hidden, head, ids


def states_of(tokens, elsewhere=()):
    hidden, head, ids = group()
    vocabulary, columns = group_vocabulary(ids[tokens], elsewhere)
    rows = probabilities_on(head[vocabulary], hidden[tokens], (hidden[tokens] @ head.T).logsumexp(-1))
    return vocabulary, GroupStates(hidden[tokens], rows, columns, width=len(vocabulary))


def on_one_rank(rank, folder, variant):
    """What each rank knows is its own two responses; V* and M are made together."""
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2, timeout=timeout)
    rows = slice(2 * rank, 2 * rank + 2)
    split = int(LENGTHS[:2].sum())
    tokens = slice(0, split) if rank == 0 else slice(split, None)
    held = [None, None]
    dist.all_gather_object(held, group()[2][tokens])
    vocabulary, states = states_of(tokens, [held[1 - rank]])

    def sum_over_ranks(matrix):
        dist.all_reduce(matrix)
        return matrix

    scores = group_influence(states, LENGTHS[rows], CORRECT[rows], variant, sum_over_ranks, chunk_tokens=4)
    torch.save((vocabulary, scores), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.system
@pytest.mark.parametrize("variant", ["thr", "nthr"])
def test_two_ranks_that_share_a_group_give_its_tokens_the_influences_of_one(tmp_path, variant):
    mp.spawn(on_one_rank, (str(tmp_path), variant), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    vocabulary, states = states_of(slice(None))
    whole = group_influence(states, LENGTHS, CORRECT, variant)
    for found, _ in parts:
        assert torch.equal(found, vocabulary)
    torch.testing.assert_close(torch.cat([scores for _, scores in parts]), whole, rtol=1e-12, atol=1e-12)
    alone = group_influence(states_of(slice(0, 7))[1], LENGTHS[:2], CORRECT[:2], variant)
    assert not torch.allclose(alone, whole[:7])  # without the other rank's right answer it is another number


def test_ranks_agree_on_the_tokens_of_the_whole_group_in_whatever_order_they_hold_them():
    first, second = torch.tensor([7, 3, 7]), torch.tensor([9, 3])
    for mine, other, places in ((first, second, [1, 0, 1]), (second, first, [2, 0])):
        vocabulary, columns = group_vocabulary(mine, [other])
        assert (vocabulary.tolist(), columns.tolist()) == ([3, 7, 9], places)
