"""Responses behind one copy of their prompt: the same log-probs and gradients as in rows of their own."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apportion.actors.microbatch import cut
from apportion.actors.modules import CausalLMLogprobs
from apportion.batch import Batch, Trajectory


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return CausalLMLogprobs(LlamaForCausalLM(config), logits_chunk_tokens=512)


def batch_of(groups):
    """groups: (prompt length, [response length, ...]); the second token of long responses is the environment's."""
    rng, trajectories = np.random.default_rng(1), []
    for group, (prompt_length, lengths) in enumerate(groups):
        prompt = rng.integers(1, 50, prompt_length)
        for index, length in enumerate(lengths):
            mask = np.ones(length, bool)
            mask[1:2] = length < 4
            trajectories.append(
                Trajectory(
                    prompt_id=str(group),
                    group_id=group,
                    sample_index=index,
                    token_ids=np.concatenate([prompt, rng.integers(1, 50, length)]).astype(np.int32),
                    prompt_length=prompt_length,
                    action_mask=mask,
                    turn_ids=np.where(mask, 0, -1),
                    behavior_logprobs=np.zeros(length, np.float32),
                    policy_version=0,
                    finish_reason="stop",
                    text="",
                )
            )
    return Batch.from_trajectories(trajectories)


def pass_over(module, batch, tokens, share):
    """Packed log-probs, and the gradient of their sum weighted by place, over all micro-batches."""
    module.zero_grad()
    out = np.zeros(int(batch.response_lengths.sum()), np.float32)
    weights = np.linspace(-1, 1, len(out), dtype=np.float32)
    micros = cut(batch, np.arange(len(batch)), tokens, share)
    for micro in micros:
        tree = (micro.tree.positions, micro.tree.visible) if micro.tree else None
        logprobs, _ = module(micro.input_ids, micro.rows, micro.columns, micro.targets, tree=tree)
        out[micro.packed_index] = logprobs.detach().numpy()
        (micro.spread(logprobs) * micro.gather(weights, "cpu")).sum().backward()
    return out, torch.cat([p.grad.flatten() for p in module.parameters()]), micros


GROUPS = [(7, [5, 1, 6]), (3, [4, 4]), (9, [2])]


@pytest.mark.parametrize("tokens", [1000, 16])
def test_shared_prompts_give_the_same_logprobs_and_gradients(module, tokens):
    batch = batch_of(GROUPS)
    alone, gradient_alone, _ = pass_over(module, batch, 1000, share=False)
    shared, gradient_shared, _ = pass_over(module, batch, tokens, share=True)
    np.testing.assert_allclose(shared, alone, atol=2e-6)
    torch.testing.assert_close(gradient_shared, gradient_alone, atol=2e-5, rtol=1e-4)


def test_a_group_stands_in_one_row_and_splits_where_it_does_not_fit():
    batch = batch_of(GROUPS)
    [whole] = cut(batch, np.arange(6), 1000, share_prompts=True)
    assert whole.input_ids.shape == (3, 19) and whole.trajectories == 6
    assert whole.real_tokens == batch.tokens == (3 * 7 + 12) + (2 * 3 + 8) + 11
    split = cut(batch, np.arange(6), 16, share_prompts=True)
    assert sorted(m.input_ids.shape[1] for m in split) == [11, 11, 13, 13]


def test_every_response_sees_its_prompt_and_itself_alone():
    [micro] = cut(batch_of([(2, [2, 1])]), np.arange(2), 1000, share_prompts=True)
    assert micro.tree is not None
    assert micro.tree.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert micro.tree.visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
