"""Batches on which macro actions are tried: rows by hand, and ragged random ones."""

import torch

from apportion.algorithms.interface import CreditInput


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def make_batch(rewards, values, mask=None, **more):
    rewards, values = tensor(rewards), tensor(values)
    mask = torch.ones(rewards.shape, dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool)
    known = {
        "group_ids_B": torch.zeros(len(rewards), dtype=torch.int64),
        "turn_ids_BT": torch.where(mask, 0, -1),
        "terminated_B": torch.ones(len(rewards), dtype=torch.bool),
        "rewards_B": torch.where(mask, rewards, 0).sum(-1),
    }
    return CreditInput(mask_BT=mask, token_rewards_BT=rewards, values_BT=values, **{**known, **more})


def random_batch(rows=6, width=23, seed=0):
    """Ragged rows with NaN outside the mask, an environment's tokens inside, and an empty row."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, width + 1, (rows,), generator=generator)
    mask = torch.arange(width)[None] < lengths[:, None]
    mask[1, 1] = False
    mask[-1] = False
    turn_ids = torch.where(mask, 0, -1)
    turn_ids[1, 2:] = torch.where(mask[1, 2:], 1, -1)
    fields = {}
    for name in ("token_rewards_BT", "values_BT", "reference_logprobs_BT"):
        raw = torch.randn(rows, width, generator=generator)
        fields[name] = torch.where(mask, -raw.abs() if name == "reference_logprobs_BT" else raw, float("nan"))
    return CreditInput(
        mask_BT=mask,
        group_ids_B=torch.arange(rows) // 2,
        rewards_B=torch.randn(rows, generator=generator),
        turn_ids_BT=turn_ids,
        terminated_B=torch.tensor([True, False] * (rows // 2)),
        token_ids_BT=torch.randint(0, 100, (rows, width), generator=generator),
        bootstrap_values_B=torch.randn(rows, generator=generator),
        **fields,
    )
