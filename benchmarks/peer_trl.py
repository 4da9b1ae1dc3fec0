"""TRL's GRPOTrainer on the workload of bench_peer.py; run by the Python of TRL's own environment."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

from peer_reward import vowels


def main(model: str, rows: str, steps: int, tokens: int, out: str) -> None:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            ends.append(time.perf_counter())

    torch.set_num_threads(torch.get_num_threads())
    questions = json.loads(Path(rows).read_text())
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in questions])
    settings = GRPOConfig(
        output_dir=str(Path(out).parent / "trl"),
        max_steps=steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=4,
        num_generations=8,
        max_completion_length=tokens,
        temperature=1.0,
        learning_rate=1e-5,
        beta=0.0,
        gradient_checkpointing=False,
        bf16=True,
        use_cpu=True,
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(model, vowels, args=settings, train_dataset=data, callbacks=[Clock()])
    trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(ends)]
    Path(out).write_text(json.dumps(seconds))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
