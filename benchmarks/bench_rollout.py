"""Tokens/s of our rollout actor (a Ray call, sampling, log-probs, packing, the object store) beside bare vLLM."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bare_side import Bare, cpu_environment
from bench_report import Part, Row, Table, median_ratio, spread, write_part
from bench_work import GROUP, RESPONSES, composed, encoder, rounds_or

ROUNDS = rounds_or(4)
TOKENS = 32
SETTINGS = [f"rollout.max_response_tokens={TOKENS}", "data.max_prompt_tokens=96"]
TOPICS = ("a lighthouse", "two rivers", "winter", "a blacksmith", "the moon", "an old map", "a market", "bees")


def prompts(model: str, round_: int) -> list[Any]:
    """Eight prompts that no answer to ends within 32 tokens; other ones each round, so no cache helps."""
    from apportion.batch import Prompt

    texts = [f"Tell a long story, number {round_}, about {topic}." for topic in TOPICS]
    encode = encoder(model)
    made = []
    for index, text in enumerate(texts):
        made.append(Prompt(f"{round_}-{index}", encode.token_ids(text), text))
    return made


def bare_settings(model: str, config: Any) -> dict[str, Any]:
    settings = {"model": model, "dtype": config.model.dtype, "max_model_len": 128, "max_num_seqs": RESPONSES}
    return settings | {"enforce_eager": not config.rollout.compile}


def measure(model: str, config: Any, cluster: Any) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Tokens/s of each round, ours and theirs, and peak MiB of both processes."""
    from apportion.actors.engines import Sampling
    from apportion.actors.rollout import RolloutWorker
    from apportion.assembly.hosts import engine_environment, thread_count
    from apportion.assembly.serving import rollout_spec
    from apportion.platform.cluster import ActorRequest, gather

    spec, environment = rollout_spec(config, model, 0), engine_environment(config, 0, alone=True)
    [actor] = cluster.start([ActorRequest("rollout-0", RolloutWorker, (spec, "rollout-0"), 1, 0, environment)], 300)
    bare = Bare(bare_settings(model, config), cpu_environment(thread_count(config.cluster)))
    speeds: dict[str, list[float]] = {"ours": [], "bare": [], "bare with log-probs": []}
    try:
        for round_ in range(-1, ROUNDS):
            batch = prompts(model, round_)
            start = time.perf_counter()
            call = actor.call("generate", batch, 0, GROUP, Sampling(1.0, max_tokens=TOKENS), returns=2)
            [report] = gather([call], 300, "rollout")
            seconds = time.perf_counter() - start
            ids = [p.token_ids.tolist() for p in batch for _ in range(GROUP)]
            plain, scored = bare.generate(ids, TOKENS, False), bare.generate(ids, TOKENS, True)
            if round_ < 0:
                continue  # the first pass warms both up
            speeds["ours"].append(report.sampled_tokens / seconds)
            speeds["bare"].append(plain["tokens"] / plain["seconds"])
            speeds["bare with log-probs"].append(scored["tokens"] / scored["seconds"])
        memory = {"ours": cluster.peak_memory_mib()["rollout-0"], "bare": scored["peak_mib"]}
    finally:
        bare.close()
    return speeds, memory


def main(out: str) -> int:
    started = time.perf_counter()
    from apportion.data.builtin import resolve_model
    from apportion.platform.cluster import Cluster

    config = composed(*SETTINGS)
    model = resolve_model(config.model.path)
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(None, "bench-rollout", 2, Path(folder), None)
        try:
            speeds, memory = measure(model, config, cluster)
        finally:
            cluster.shutdown()
    ratio = median_ratio(speeds["ours"], speeds["bare"])
    scored = median_ratio(speeds["ours"], speeds["bare with log-probs"])
    rows = [
        Row(
            "rollout tokens/s, ours / bare vLLM", ratio, "", 0.9, True,
            "vLLM itself is slower when it returns log-probs, which a policy gradient needs and the bare run does not: "
            f"with log-probs on both sides the ratio is {scored:.2f}; the rest is the Ray call and packing.",
            "bare without log-probs",
        ),
        Row("rollout tokens/s, ours / bare vLLM with log-probs", scored, ""),
        Row("peak memory of our rollout process", memory["ours"], "MiB"),
        Row("peak memory of bare vLLM", memory["bare"], "MiB"),
    ]  # fmt: skip
    table = Table("Tokens/s", ["side", "median (least to most)"], [[n, spread(v)] for n, v in speeds.items()])
    method = (
        f"{RESPONSES} sequences ({RESPONSES // GROUP} prompts, {GROUP} responses each) of {TOKENS} tokens, SmolLM2-135M, "
        f"{config.model.dtype}, {'compiled' if config.rollout.compile else 'eager'} on both sides. Ours is timed at the "
        "driver, from the call to the packed batch in the object store. Bare vLLM runs at its best setting on a CPU "
        "(every core bound, OMP_NUM_THREADS of as many, engine in the process itself). One warm-up, then "
        f"{ROUNDS} rounds in turns; the seconds beside the bare engine's are its `generate` alone."
    )
    write_part(out, Part("rollout", "Rollout", method, rows, [table]), started)
    print(json.dumps({name: statistics.median(values) for name, values in speeds.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
