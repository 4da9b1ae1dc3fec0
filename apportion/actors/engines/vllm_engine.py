"""vLLM as a rollout engine: continuous batching, paged cache, tensor parallelism; on CPU and GPU."""

from __future__ import annotations

import os
import tempfile
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from apportion.actors.engines import EngineSpec, Request, Sample, Sampling
from apportion.actors.engines.vllm_worker import Answer, index_of
from apportion.data.response_text import ResponseText
from apportion.platform import progress
from apportion.platform.channel import ChannelAddress
from apportion.platform.device_memory import DeviceMemory, most
from apportion.platform.errors import WeightSyncError
from apportion.platform.process import safe_children
from apportion.platform.weights import SyncReceipt, TensorEntry, WeightBundle


class VllmEngine:
    """One vLLM engine. With one worker it lives in this process; with tensor parallelism vLLM starts its own."""

    def __init__(self, spec: EngineSpec) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(spec.kv_cache_gib)))
        # By default vLLM leaves one core alone; sampling and updating take turns, so it may have them all.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", thread_binding(spec, sorted(os.sched_getaffinity(0))))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        import vllm
        from vllm.platforms import current_platform

        self._workers = spec.tensor_parallel_size
        with safe_children():
            self._llm = vllm.LLM(
                model=spec.model,
                dtype=spec.dtype,
                seed=spec.seed,
                max_model_len=spec.max_model_len,
                max_num_seqs=spec.max_sequences,
                tensor_parallel_size=spec.tensor_parallel_size,
                gpu_memory_utilization=spec.gpu_memory_utilization,
                # Graphs hold the addresses of weights. A sync keeps them: vLLM's reload copies into the tensors that are there.
                enforce_eager=not spec.compile,
                enable_prefix_caching=spec.prefix_caching,
                # A prompt in pieces makes vLLM wind the request's generator back, which torch's CPU generator cannot do. On a
                # GPU it can, and vLLM's newer runner draws from the seed and the position alone.
                enable_chunked_prefill=False if spec.seeded and current_platform.is_cpu() else None,
                trust_remote_code=spec.trust_remote_code,
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                worker_extension_cls="apportion.actors.engines.vllm_worker.WeightReceiver",
            )
        count_steps(self._llm.llm_engine)
        self._tokenizer = self._llm.get_tokenizer()
        self._spell = ResponseText(self._tokenizer)

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        prompts = [{"prompt_token_ids": r.token_ids.tolist()} for r in requests]
        params = [self._params(sampling, r) for r in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            _sample(output.outputs[0], self._text(prompt["prompt_token_ids"], output.outputs[0], param))
            for prompt, output, param in zip(prompts, outputs, params, strict=True)
        ]

    def _text(self, prompt: list[int], output: Any, params: Any) -> str:
        if self._spell.keeps_tags:
            return self._spell(output.token_ids)
        return str(output.text) if params.detokenize else detokenized(self._tokenizer, prompt, output.token_ids, params)

    def _params(self, sampling: Sampling, request: Request) -> Any:
        import vllm

        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens if request.max_tokens is None else request.max_tokens,
            stop=sampling.stop or None,
            include_stop_str_in_output=True,  # the text is what was sampled
            skip_special_tokens=not self._spell.keeps_tags,  # else a stop text that is a special token would not stop
            seed=request.seed,
            logprobs=0,  # that of the sampled token alone
            flat_logprobs=True,
            # With text vLLM spells every token once more for its log-prob, in the thread that drives the GPU: 2 of 3 parts of
            # what a token costs there. Only a stop text has to be looked for while sampling.
            detokenize=bool(sampling.stop),
        )

    def score(self, token_ids: np.ndarray) -> np.ndarray:
        import vllm

        # Greedy, so that the one token to sample moves no random state. A token read from the prefix cache has no log-prob.
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, skip_reading_prefix_cache=True, detokenize=False
        )
        ids = token_ids.tolist()
        [output] = self._llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        known = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        return np.fromiter((at[token].logprob for at, token in known), np.float32, len(ids) - 1)

    def load(self, bundle: WeightBundle, name: str, check: bool) -> SyncReceipt:
        if self._workers == 1:
            answers = self._llm.collective_rpc("apportion_load", args=(bundle, check))
        else:
            with tempfile.TemporaryDirectory(dir=_shared_memory()) as folder:
                path = Path(folder) / "weights.bin"
                bundle.data.tofile(path)
                answers = self._llm.collective_rpc(
                    "apportion_load_file", args=(str(path), index_of(bundle.entries), bundle.version, check)
                )
        self._llm.reset_prefix_cache()
        return _read_back(merge_receipts(answers, bundle.entries, bundle.version, name, check), check)

    def device_memory(self) -> DeviceMemory | None:
        return most(self._llm.collective_rpc("apportion_device_memory"))

    def join(self, address: ChannelAddress, first_member: int) -> None:
        self._llm.collective_rpc("apportion_join", args=(astuple(address), first_member))

    def receive(self, entries: list[TensorEntry], version: int, name: str, check: bool) -> SyncReceipt:
        answers = self._llm.collective_rpc("apportion_receive", args=(index_of(entries), version, check))
        self._llm.reset_prefix_cache()
        return _read_back(merge_receipts(answers, entries, version, name, check), check)


def count_steps(engine: Any) -> None:
    """Count each decoding step of a vLLM engine as progress of the call that is under way."""
    step = engine.step

    def counted() -> Any:
        progress.advance()
        return step()

    engine.step = counted


def thread_binding(spec: EngineSpec, allowed: list[int]) -> str:
    """The cores of each vLLM worker, out of those this process is allowed: `0,1`, or `0|1` for two workers.

    >>> from types import SimpleNamespace
    >>> thread_binding(SimpleNamespace(first_thread=0, threads=4, tensor_parallel_size=2), [2, 3, 8, 9])
    '2,3|8,9'
    """
    cores = allowed[spec.first_thread : spec.first_thread + spec.threads] or allowed
    share = max(1, len(cores) // spec.tensor_parallel_size)
    starts = [worker * share % len(cores) for worker in range(spec.tensor_parallel_size)]
    return "|".join(",".join(map(str, cores[start : start + share])) for start in starts)


def _read_back(receipt: SyncReceipt, check: bool) -> SyncReceipt:
    """WeightSyncError where the live model has no name that was sent: checksums then say what arrived, not what is held."""
    if check and not receipt.checked_live:
        raise WeightSyncError(
            f"{receipt.engine}: none of the live model's parameters has the name of a sent tensor, so what it holds cannot be "
            "read back; train.sync_check=false goes on with the checksums of what it received"
        )
    return receipt


def merge_receipts(
    answers: list[Answer], entries: list[TensorEntry], version: int, name: str, check: bool
) -> SyncReceipt:
    """One receipt for all tensor-parallel workers: a tensor is right, or proved, only if it is so in each of them."""
    errors = list(dict.fromkeys(error for answer in answers for error in answer.errors))
    if errors:
        raise WeightSyncError(
            f"{name}: vLLM did not load all weights of sync {version}: {'; '.join(errors[:4])}; its samples would come from "
            "another policy"
        )
    checksums: dict[str, str] = {}
    sent = {e.name: e.checksum for e in entries}
    for answer in answers:
        checksums.update({n: c for n, c in answer.checksums.items() if n not in checksums or sent.get(n) != c})
    wrong = sorted({n for answer in answers for n in answer.wrong})
    in_each = set(sent).intersection(*(answer.proved for answer in answers))
    proved = [n for n in sent if n in in_each] if check else None
    checked, read_bytes = sum(a.checked for a in answers), sum(a.read_bytes for a in answers)
    return SyncReceipt(name, version, checksums, checked, wrong, proved, read_bytes)


def detokenized(tokenizer: Any, prompt: list[int], token_ids: list[int], params: Any) -> str:
    """The text that vLLM makes of a response while it samples, by the same code, afterwards. It depends on the end of the
    prompt too, and leaves out last bytes that are no whole character."""
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    request: Any = SimpleNamespace(request_id="", prompt_token_ids=prompt, prompt_embeds=None, sampling_params=params)
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    detokenizer.update(list(token_ids), stop_terminated=False)
    return str(detokenizer.get_next_output_text(finished=True, delta=False))


def _sample(output: Any, text: str) -> Sample:
    """`output.logprobs` is flat, and at each position the sampled token comes first."""
    ids, flat = list(output.token_ids), output.logprobs
    if [flat.token_ids[start] for start in flat.start_indices] != ids:
        raise RuntimeError(f"vLLM: got log-probs of other tokens than the {len(ids)} that it sampled, expected theirs")
    logprobs = np.asarray(flat.logprobs, np.float32)[flat.start_indices]
    reason = output.finish_reason if output.finish_reason in ("stop", "length") else "abort"
    return Sample(np.asarray(ids, np.int32), logprobs, reason, text)


def _shared_memory() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None
