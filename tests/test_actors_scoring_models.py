"""Rewards from reward models: which ids they read, their context, and models that are none."""

import numpy as np
import pytest
from scoring_parts import batch_of, score

from apportion.actors.scoring import Scorer
from apportion.data.prompts import TokenizerPath
from apportion.platform.errors import ConfigError


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A random one-label Llama on the tiny model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from apportion.data.prompts import load_tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPORTION_CACHE", str(tmp_path_factory.mktemp("cache")))
        tokenizer = load_tokenizer("builtin:tiny")
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=1,
        pad_token_id=0,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reward_model")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def expected_logit(folder, ids) -> float:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


def test_a_reward_model_with_the_policys_vocabulary_reads_the_sampled_ids(reward_model):
    batch, prompts = batch_of("a", "abcde", "abc")
    scored, report = score(
        {"function": f"model:{reward_model}", "batch_size": 2},
        batch,
        prompts,
        tokenizer=TokenizerPath(str(reward_model)),
    )
    wanted = [expected_logit(reward_model, batch.sequence(i).tolist()) for i in range(3)]
    np.testing.assert_allclose(scored.rewards, wanted, atol=1e-5)
    assert len(set(wanted)) == 3
    assert report.component_counts == {"reward_model": 3}


def test_a_reward_model_of_another_tokenizer_reads_the_text_through_its_own_template(reward_model):
    from transformers import AutoTokenizer

    scored, _ = score(f"model:{reward_model}", *batch_of("yes"))
    ids = AutoTokenizer.from_pretrained(reward_model)("<|user|>q0<|end|><|assistant|>yes<|end|>")["input_ids"]
    np.testing.assert_allclose(scored.rewards, [expected_logit(reward_model, ids)], atol=1e-5)


def test_a_sequence_past_the_reward_models_context_fails_alone(reward_model):
    scored, report = score(
        f"model:{reward_model}", *batch_of("yes", "x" * 40), tokenizer=TokenizerPath(str(reward_model))
    )
    assert scored.sample_mask.tolist() == [True, False]
    assert report.first_traceback == "reward_model: got 42 tokens, the model takes 32"


def test_a_model_that_is_no_reward_model_is_refused(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="got a model with 3 labels, expected 1"):
        Scorer(f"model:{tmp_path}")
    with pytest.raises(ConfigError, match="could not be loaded"):
        Scorer(f"model:{tmp_path / 'nowhere'}")
