"""Plain vLLM behind a socket, a line of JSON each way: the other side of bench_rollout.py."""

from __future__ import annotations

import json
import resource
import socket
import sys
import time


def main() -> None:
    import vllm

    stream = socket.socket(fileno=int(sys.argv[1])).makefile("rw")
    llm = vllm.LLM(**json.loads(sys.argv[2]), disable_log_stats=True)
    stream.write("{}\n")
    stream.flush()
    for line in stream:
        request = json.loads(line)
        params = vllm.SamplingParams(
            temperature=1.0, max_tokens=request["max_tokens"], logprobs=0 if request["logprobs"] else None
        )
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in request["ids"]], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        stream.write(json.dumps({"tokens": tokens, "seconds": seconds, "peak_mib": peak}) + "\n")
        stream.flush()


if __name__ == "__main__":
    main()
