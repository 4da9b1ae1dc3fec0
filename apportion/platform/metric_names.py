"""The one table of metric names. Whatever is logged under a name that is not here is an error in the tests.

A `<part>` in a name stands for any text without a slash; `docs/metrics.md` is generated from this table
(`python -m apportion.platform.metric_names > docs/metrics.md`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

METRICS: dict[str, str] = {
    "reward/mean": "mean weighted reward of this step's trajectories, before shaping and KL; failed ones left out",
    "reward/std": "their standard deviation",
    "reward/failed_share": "share of trajectories whose reward raised, timed out or was malformed",
    "reward/failed/<reason>": "share of trajectories whose reward failed for this reason (docs/rewards.md)",
    "reward/no_opinion_share": "share of trajectories that every reward function said None to",
    "reward/<component>": "mean of one reward function before its weight, by the function's name",
    "data/skipped": "training rows left out since the run began, each counted once (data.on_bad_row=skip)",
    "data/skipped/<reason>": "those of one reason (docs/data.md)",
    "data/reasoning_left_out": "training rows so far of which the chat template leaves out reasoning of earlier turns, each counted once",
    "judge/critiques": "critiques wanted in this step, k for each response that has steps",
    "judge/cached_share": "share of them known before, or asked for an equal response of the same call",
    "judge/failed_share": "share of them without a vote, whatever the reason",
    "judge/failed/<reason>": "critiques without a vote, by reason (docs/judges.md)",
    "judge/unjudged_share": "share of responses with steps for which no critique is left: no penalty",
    "judge/wrong_step_share": "share of all steps (an environment's text is steps too) that the vote found wrong",
    "judge/steps_mean": "mean number of steps of a response",
    "judge/seconds": "seconds of the longest call of a judge, beside sampling and scoring",
    "policy/loss": "sum of loss weight x token loss, mean over this step's optimiser steps",
    "policy/kl_reference": "mean over action tokens of the KL from the policy to the reference (k3): before the update, or during it with kl.place=loss",
    "policy/entropy": "mean over the tokens trained on of the entropy of the policy's next-token distribution, in nats; this and the other means of the update leave out responses whose credit is 0 throughout, for which no pass is made",
    "policy/clip_fraction": "share of the tokens trained on whose ratio the surrogate clipped",
    "policy/dual_clip_fraction": "share of action tokens where the dual clip's lower bound held",
    "policy/approx_kl": "mean over action tokens of (ratio - 1) - log ratio, new policy against old",
    "policy/ratio_mean": "mean over the tokens trained on of the probability ratio, new policy against old",
    "policy/ratio_max": "largest such ratio",
    "policy/distillation_<quantity>": "mean over action tokens of a quantity of the distillation: kl, total_variation, "
    "alpha (extrapolation), weight",
    "policy/grad_norm": "norm of the policy's gradient before clipping, mean over optimiser steps",
    "policy/learning_rate": "learning rate of the last optimiser step",
    "policy/optimizer_steps": "optimiser steps taken in this step",
    "policy/kl_coefficient": "coefficient of the KL term, where it is adaptive or in use",
    "critic/loss": "value loss, mean over optimiser steps",
    "critic/clip_fraction": "share of action tokens whose value loss is that of the clipped value; absent with critic.value_clip=null",
    "critic/explained_variance": "1 - var(returns - values) / var(returns), over action tokens; 1 is perfect",
    "critic/grad_norm": "norm of the critic's gradient before clipping, mean over optimiser steps",
    "rollout/response_tokens_mean": "mean number of tokens that the policy wrote in a response, an environment's left out",
    "rollout/response_tokens_max": "most tokens that it wrote in one",
    "rollout/truncated_share": "share of trajectories cut by a limit: of tokens, of turns, or the environment's own",
    "rollout/trajectories": "trajectories sampled in this step",
    "rollout/groups_dropped": "groups that algorithm.selection left out of the update",
    "rollout/groups_surplus": "groups that algorithm.selection kept beyond train.prompts_per_step, left out of the update; with dynamic sampling alone",
    "rollout/prompts": "prompts sampled from in this step",
    "rollout/turns_mean": "mean number of policy turns of a trajectory",
    "rollout/environment_failures": "episodes whose environment raised, was late or gave no reward; they are masked",
    "rollout/environment_seconds": "seconds that sampling waited for environments, of the slowest engine",
    "mismatch/abs_logprob_diff": "mean over the tokens trained on of |trainer's log-prob - rollout engine's log-prob|; where none is, over all",
    "mismatch/kl": "mean over action tokens of rollout's log-prob - trainer's (k1 estimate)",
    "mismatch/k3": "mean over action tokens of (ratio - 1) - log ratio, trainer against rollout",
    "mismatch/max": "largest absolute difference of log-probs",
    "mismatch/share_beyond_bound": "share of action tokens that differ by more than algorithm.correction.bound",
    "mismatch/correction_mean": "mean over action tokens of the importance weight, truncated or masked, before normalizing",
    "mismatch/share_corrected": "share of action tokens whose importance weight a bound changed: truncated, or masked to 0",
    "weights/version": "version of the weights that every rollout engine holds after this step",
    "weights/bytes": "bytes of weights sent to one engine",
    "sync/sent_bytes": "bytes of weights sent to one engine in this step's sync",
    "sync/proved_bytes": "those of tensors that were compared with a live parameter in every worker of the engine; of the engine with the fewest; absent with train.sync_check=false",
    "sync/read_bytes": "bytes of live parameters that the comparison read back, in all workers of an engine; less than proved where matrices are repacked (docs/weights.md)",
    "sync/gap": "mean absolute difference, in nats, of engine's and trainer's log-probs of a fixed text, of the engine that differs most: after the sync of steps 1 to 3 and of every tenth, or after the sync of a start or resume just before (docs/design.md)",
    "sync/baseline": "this difference before the first sync, when both hold the original files; train.max_sync_gap follows from it",
    "timing/rollout": "seconds spent sampling",
    "timing/score": "seconds spent on rewards",
    "timing/judge": "seconds spent waiting for critiques after scoring",
    "timing/cut": "seconds spent selecting, packing and cutting the batch for the ranks",
    "timing/signals": "seconds spent on old and reference log-probs, values and other signals",
    "timing/credit": "seconds spent on credit",
    "timing/update": "seconds spent on optimiser steps",
    "timing/sync": "seconds spent moving weights to the rollout engines and proving them, sync/gap included",
    "timing/step": "seconds of the whole step, without evaluation and checkpoint",
    "timing/other": "timing/step less every stage above",
    "timing/evaluate": "seconds spent evaluating after the step",
    "timing/checkpoint": "seconds spent writing the checkpoint after the step before; summary.json has the sum of all",
    "perf/samples_per_second": "trajectories given to the update, a second of the step (evaluation and checkpoints left out)",
    "perf/rollout_tokens_per_second": "tokens that the engines sampled (none of an environment), a second of timing/rollout",
    "perf/update_tokens_per_second": "prompt and response tokens that went forward and backward (the critic's, while it trains alone), a second of timing/update",
    "perf/overhead_share": "share of the step that is neither sampling nor forward or backward passes",
    "gpu/<role>_gib": "most GPU memory that a process of this role reserved in this step, in GiB; absent on CPUs",
    "gpu/used_gib": "memory in use after the step on the fullest GPU, by all processes, in GiB",
    "sft/grad_norm": "norm of the gradient before clipping",
    "sft/learning_rate": "learning rate of this optimiser step",
    "sft/loss": "weighted sum of the answers' token NLL: their mean, by sft.reduction",
    "sft/nll": "mean over answer tokens of -log prob",
    "reward_model/grad_norm": "norm of the gradient before clipping",
    "reward_model/learning_rate": "learning rate of this optimiser step",
    "reward_model/loss": "mean over this step's pairs of the Bradley-Terry loss",
    "reward_model/accuracy": "share of this step's pairs whose chosen answer scores higher, before the step; ties half",
    "reward_model/margin": "mean score of the chosen answers less that of the rejected ones",
    "reward_model/chosen_score": "mean score of the chosen answers",
    "reward_model/rejected_score": "mean score of the rejected answers",
    "dpo/grad_norm": "norm of the gradient before clipping",
    "dpo/learning_rate": "learning rate of this optimiser step",
    "dpo/loss": "mean over this step's pairs of the DPO loss; with dpo.reverse the two answers have changed places",
    "dpo/accuracy": "share of this step's pairs with a positive margin, before the step; ties half",
    "dpo/margin": "mean of beta x (log-ratio of the chosen answer - that of the rejected one), against the reference; "
    "with dpo.reverse the other way round",
    "dpo/chosen_logprob": "mean over pairs of the log-prob of the answer that the data calls chosen, a sum over tokens",
    "dpo/rejected_logprob": "likewise of the answer that the data calls rejected",
    "eval/pair_accuracy": "share of held-out pairs with a positive margin (dpo/margin, reward_model/margin); ties half",
    "eval/pair_margin": "mean such margin of held-out pairs",
    "eval/pair_loss": "mean loss of held-out pairs",
    "eval/nll": "mean over held-out answer tokens of -log prob",
    "eval/greedy_accuracy": "share of held-out prompts whose greedy answer is rewarded evaluation.correct_at or more",
    "eval/failed_share": "share of held-out answers, greedy and sampled, whose reward failed; left out of accuracy, reward, avg and pass",
    "eval/mean_reward": "mean reward of the greedy answers",
    "eval/avg_at_k": "share of correct answers among evaluation.samples sampled ones, mean over prompts",
    "eval/pass_at_<k>": "unbiased estimate of the chance that at least one of k samples is correct",
    "eval/response_tokens_mean": "mean number of tokens that the policy wrote in a greedy answer",
    "credit/groups": "groups that credit compared",
    "credit/constant_groups": "those whose rewards are all alike, groups of one included: no advantage",
    "credit/singleton_groups": "those of one response",
    "credit/raw_advantage_mean": "mean of the advantages before whitening, over tokens, turns or macro actions as the method has them",
    "credit/raw_advantage_std": "their standard deviation",
    "credit/<quantity>": "what the credit method reports about its own work (methods.md)",
    "tracking/failures": "tracking backends that failed and were given up, so far",
}


@cache
def _patterns() -> re.Pattern[str]:
    parts = []
    for name in METRICS:
        pieces = re.split(r"<[^>]+>", name)
        parts.append(r"[^/]+".join(re.escape(piece) for piece in pieces))
    return re.compile("|".join(parts))


def unknown_metrics(names: Iterable[str]) -> list[str]:
    """Those of `names` that the table does not have, sorted.

    >>> unknown_metrics(["reward/mean", "eval/pass_at_8", "reward/maen/x"])
    ['reward/maen/x']
    """
    return sorted(name for name in names if not _patterns().fullmatch(name))


def as_markdown() -> str:
    """The table as `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "Every number that a run logs, under the same name in `metrics.jsonl`, TensorBoard and wandb. Generated from",
        "`apportion/platform/metric_names.py` with `python -m apportion.platform.metric_names > docs/metrics.md`.",
        "What a step does not know is absent from it, never 0. Means over tokens are over the tokens the policy chose.",
    ]
    section = ""
    for name, description in METRICS.items():
        if name.split("/")[0] != section:
            section = name.split("/")[0]
            lines += ["", f"## {section}", "", "| name | meaning |", "|---|---|"]
        lines.append(f"| `{name}` | {description.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
