"""Which families of models a sync is proved for: tiny random models, really synced with a vLLM engine.

    make families                                  # all of them, each in its own process
    python -m benchmarks.families qwen3 mixtral    # some

For each family: sync, then disturb one kind of parameter at a time (the query matrices of all layers, say), sync, and
compare the trainer's and the engine's log-probs of the engine's own samples. A family is proved if every gap after a
sync is at most `BOUND` and the proof covers every sent byte.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BOUND = 0.01  # mean absolute difference of log-probs, in nats
LIMIT_SECONDS = 600  # of one family's process; half a minute on idle cores
PROMPT = range(10, 40)
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A tiny model of transformers' class `name`, and how it is trained and served."""

    name: str  # of the classes: `Llama` of LlamaConfig and LlamaForCausalLM
    settings: dict[str, Any]
    attention: str = "sdpa"
    workers: int = 1


_HEADS = {"head_dim": 32}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", {"tie_word_embeddings": False}),
    "llama_tied": Family("Llama", {"tie_word_embeddings": True}),
    "llama_bias": Family("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Family("Mistral", {"sliding_window": None}),
    "qwen2": Family("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3", {**_HEADS, "tie_word_embeddings": True}),
    "gemma2": Family("Gemma2", _HEADS, "eager"),
    "gemma3_text": Family("Gemma3", {**_HEADS, "sliding_window": 64}),
    "phi3": Family("Phi3", {}),
    "olmo2": Family("Olmo2", {}),
    "qwen2_moe": Family("Qwen2Moe", {**_MIXTURE, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1}),
    "qwen3_moe": Family("Qwen3Moe", {**_HEADS, **_MIXTURE, "decoder_sparse_step": 1}),
    "mixtral": Family("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "olmoe": Family("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "llama_2_workers": Family("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}, workers=2),
    "phi3_2_workers": Family("Phi3", {"num_key_value_heads": 1}, workers=2),
    "qwen3_moe_2_workers": Family("Qwen3Moe", {**_HEADS, **_MIXTURE, "decoder_sparse_step": 1}, workers=2),
}


@dataclass
class Result:
    family: str
    tensors: int
    kinds: int
    sent_bytes: int
    proved_bytes: int
    smallest_change: float  # gap before a sync, of the kind of parameter that changes the samples least
    worst_gap: float  # after a sync
    worst_kind: str

    @property
    def proved(self) -> bool:
        return self.worst_gap <= BOUND and self.proved_bytes == self.sent_bytes


def make(family: Family, folder: Path) -> None:
    """A model and a tokenizer that any prompt of ids below 264 fits."""
    import torch
    import transformers

    from apportion.data.builtin import resolve_model

    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model("builtin:tiny"))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    prefix = f"{family.name}Text" if family.name == "Gemma3" else family.name
    config = getattr(transformers, f"{prefix}Config")(
        **{**SIZES, "vocab_size": len(tokenizer), "bos_token_id": None, **ends, **family.settings}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.name}ForCausalLM")(config).to(torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Pair:
    """A trainer's model and a vLLM engine of the same files."""

    def __init__(self, folder: Path, family: Family) -> None:
        from apportion.actors.engines import EngineSpec
        from apportion.actors.engines.vllm_engine import VllmEngine
        from apportion.actors.loading import load_causal_lm
        from apportion.actors.modules import CausalLMLogprobs

        self.trainer = CausalLMLogprobs(load_causal_lm(str(folder), "bfloat16", family.attention), 512)
        self.engine = VllmEngine(
            EngineSpec(
                model=str(folder), dtype="bfloat16", seed=0, max_model_len=256, max_sequences=8,
                tensor_parallel_size=family.workers, gpu_memory_utilization=0.5, kv_cache_gib=1.0, compile=False,
                prefix_caching=True, trust_remote_code=False, threads=2, first_thread=0,
            )
        )  # fmt: skip
        self.version = 0
        self.first = {n: p.detach().clone() for n, p in self.trainer.named_parameters()}

    def gap(self) -> float:
        """Mean absolute difference of log-probs over samples of the engine."""
        import numpy as np
        import torch

        from apportion.actors.engines import Request, Sampling

        requests = [Request(np.array(PROMPT, np.int32)) for _ in range(4)]
        gaps = []
        for sample in self.engine.generate(requests, Sampling(max_tokens=60)):
            count, start = len(sample.token_ids), len(PROMPT)
            ids = torch.tensor([[*PROMPT, *sample.token_ids.tolist()]])
            places = torch.arange(start - 1, start - 1 + count)
            with torch.no_grad():
                logprobs, _ = self.trainer(ids, torch.zeros(count, dtype=torch.long), places, ids[0, start:])
            gaps.append((logprobs - torch.from_numpy(sample.logprobs)).abs())
        return float(torch.cat(gaps).mean())

    def sync(self) -> tuple[int, int, int]:
        """Tensors, bytes sent and bytes proved."""
        from apportion.actors.lora import merged_weights
        from apportion.platform.weights import WeightBundle, prove

        named = merged_weights(((n, p.detach()) for n, p in self.trainer.named_parameters()), None)
        bundle = WeightBundle.pack(named, self.version)
        receipt = self.engine.load(bundle, "engine", True)
        prove([receipt], bundle.entries, self.version)
        self.version += 1
        proved = set(receipt.proved or [])
        return len(bundle.entries), bundle.nbytes, sum(e.size for e in bundle.entries if e.name in proved)

    def disturb(self, names: list[str]) -> None:
        """The first weights again, but for these parameters, which get noise."""
        import torch

        with torch.no_grad():
            for name, parameter in self.trainer.named_parameters():
                value = self.first[name]
                parameter.copy_(value)
                if name in names:
                    spread = 0.5 * value.float().std().nan_to_num() + 0.1
                    parameter.add_((torch.randn(value.shape) * spread).to(value.dtype))


def measure(key: str) -> Result:
    """Sync one family, changed in one kind of parameter after the other."""
    family = FAMILIES[key]
    with tempfile.TemporaryDirectory() as folder:
        make(family, Path(folder))
        pair = Pair(Path(folder), family)
        tensors, sent, proved = pair.sync()
        kinds: dict[str, list[str]] = {}
        for name in pair.first:
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name).removeprefix("model."), []).append(name)
        result = Result(key, tensors, len(kinds), sent, proved, float("inf"), pair.gap(), "none")
        for kind, names in kinds.items():
            pair.disturb(names)
            before = pair.gap()
            _, sent, proved = pair.sync()
            after = pair.gap()
            pair.disturb([])
            pair.sync()
            result.proved_bytes = min(result.proved_bytes, proved)
            result.smallest_change = min(result.smallest_change, before)
            if after > result.worst_gap:
                result.worst_gap, result.worst_kind = after, kind
            print(f"{key}: {kind}: {before:.4f} before its sync, {after:.4f} after", file=sys.stderr)
    return result


def measured_apart(key: str) -> Result | str:
    """`measure` in its own process; the reason where there is no result."""
    command = [sys.executable, "-m", "benchmarks.families", "--one", key]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no result within {LIMIT_SECONDS} seconds"
    if done.returncode == 0:
        return Result(**json.loads(done.stdout.splitlines()[-1]))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), f"exit status {done.returncode}")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--one"]:
        print(json.dumps(asdict(measure(arguments[1]))), flush=True)
        os._exit(0)  # vLLM's workers and threads are not waited for
    unknown = [key for key in arguments if key not in FAMILIES]
    if unknown:
        print(f"got {', '.join(unknown)}, expected some of {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    print("| family | tensors | kinds disturbed | proved of sent bytes | least gap before a sync | worst gap after | |")
    print("|---|---|---|---|---|---|---|")
    failed = 0
    for key in arguments or FAMILIES:
        result = measured_apart(key)
        if isinstance(result, str):
            print(f"| {key} | | | | | | not proved: {result} |", flush=True)
        else:
            print(
                f"| {key} | {result.tensors} | {result.kinds} | {result.proved_bytes:,} of {result.sent_bytes:,} "
                f"| {result.smallest_change:.4f} | {result.worst_gap:.4f} "
                f"| {'proved' if result.proved else f'not proved: {result.worst_kind}'} |",
                flush=True,
            )
        failed += isinstance(result, str) or not result.proved
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
