"""Hugging Face models from and to disk."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.data.model_errors import of_model_files, reason
from apportion.platform.errors import CheckpointError, ConfigError
from apportion.platform.tracking import one_line


def load_causal_lm(
    path: str,
    dtype: str,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    lora: Any | None = None,
) -> Any:
    """A causal LM ready to be trained; with `lora` (rank, alpha, dropout, targets) only its adapters are."""
    from transformers import AutoModelForCausalLM

    with model_refused(path, trust_remote_code), attention_refused(attention, path), tensors_only(path):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    check_attention_softcap(model.config, attention, path)
    model.config.use_cache = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    if gradient_checkpointing:
        model.enable_input_require_grads()
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    _check_mergeable(model, lora)
    return adapted


@contextmanager
def model_refused(path: str, trust_remote_code: bool = False) -> Iterator[None]:
    """Turn what transformers raises over a model's files into one line. With `trust_remote_code` errors keep their traceback:
    the model's code may be at fault."""
    try:
        yield
    except Exception as error:
        if trust_remote_code or not of_model_files(error):
            raise
        raise ConfigError(
            f"{path}: the model cannot be loaded ({type(error).__name__}: {reason(error)}), expected the whole folder of a "
            "causal language model: fetch it again"
        ) from error


@contextmanager
def tensors_only(path: str) -> Iterator[None]:
    """torch refuses a pickle that holds code, with advice to let it run; this says what is wrong and what is safe."""
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        if found is None:
            raise CheckpointError(
                f"{path}: got a pickle that is damaged or holds code, expected tensors alone: take the weights as safetensors, "
                "or another copy"
            ) from error
        raise CheckpointError(
            f"{path}: got a pickle that holds code ({found[1]}), which loading would run, expected tensors alone: take the "
            "weights as safetensors, or a checkpoint from whoever you trust"
        ) from error
    except EOFError as error:
        raise CheckpointError(f"{path}: got a file that ends early, expected tensors: take another copy") from error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise CheckpointError(
            f"{path}: got a damaged archive ({one_line(error)}), expected tensors: take another copy"
        ) from error


@contextmanager
def attention_refused(attention: str, path: str) -> Iterator[None]:
    """transformers says so of an architecture that has not every implementation, without the key to change."""
    try:
        yield
    except ValueError as error:
        if "attention" not in str(error) or "support" not in str(error):
            raise
        raise ConfigError(
            f"model.attention: got {attention}, which {path} has not, expected eager ({one_line(error)})"
        ) from error


def attention_softcap(config: Any) -> float | None:
    """The cap on attention's logits, which few architectures have."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def check_attention_softcap(config: Any, attention: str, path: str) -> None:
    """transformers' sdpa leaves a cap on attention's logits out without a word (Gemma 2); the engines apply it."""
    cap = attention_softcap(config)
    if cap is not None and attention == "sdpa":
        raise ConfigError(
            f"model.attention: got sdpa, which leaves out the cap of {cap:g} on the attention of {path}, expected eager or "
            "flash_attention_2"
        )


def _check_mergeable(model: Any, lora: Any) -> None:
    """Engines get merged weights: an embedding's adapter has another form, and one of two tied matrices would untie them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = isinstance(model.get_output_embeddings(), BaseTunerLayer)
    if isinstance(model.get_input_embeddings(), BaseTunerLayer) or (head and model.config.tie_word_embeddings):
        raise ConfigError(
            f"policy.lora.targets: got {', '.join(lora.targets)}, which adapt the embeddings (or an output head that is the "
            "same matrix), expected linear layers such as q_proj"
        )
    named = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    without = [t for t in lora.targets if not any(name == t or name.endswith(f".{t}") for name in named)]
    if without:
        raise ConfigError(f"policy.lora.targets: got {', '.join(without)}, which no layer of the model is called")
    if any(type(m.get_base_layer()) is not torch.nn.Linear for m in model.modules() if isinstance(m, BaseTunerLayer)):
        raise ConfigError(
            f"policy.lora.targets: got {', '.join(lora.targets)}, of which some are no linear layers (GPT-2's are stored "
            "the other way round), expected linear ones"
        )


def save_huggingface(
    base: str, named: dict[str, Tensor], folder: Path, trust_remote_code: bool = False, chat_template: str | None = None
) -> None:
    """Write weights with the config and tokenizer of `base`, so that `from_pretrained(folder)` loads them.

    `chat_template` is the text of the one that the model was trained with, None for the tokenizer's own.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    generation = None
    with model_refused(base, trust_remote_code):
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
        with suppress(OSError):  # not every model has one; a hub's name may be no folder
            generation = _that_can_be_saved(GenerationConfig.from_pretrained(base))
    if "lm_head.weight" in named:  # a head of its own, whatever the configuration says: `from_pretrained` kept it so
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    dtype = next(iter(named.values())).dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    cpu = {name: tensor.to("cpu") for name, tensor in named.items()}
    if generation is not None:
        model.generation_config = generation
    model.save_pretrained(folder, state_dict=cpu)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def _that_can_be_saved(generation: Any) -> Any:
    """transformers loads settings that it then refuses to write: a temperature without `do_sample`, which is meant."""
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
    try:
        generation.validate(strict=True)
    except ValueError:
        ends = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return type(generation)(**ends)
    return generation
