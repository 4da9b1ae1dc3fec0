#!/bin/sh
# From a file of pairs to tokens' credit: sft, reward model, dpo, reverse dpo, then MA-RLHF with the reward model and
# AlignDistil with the two dpo models as its teachers.
#
#   examples/hh_pipeline.sh pairs.jsonl.gz [MODEL]
#
# Pairs are in any format of docs/preference.md (the hh format among them). Run it where runs/ is to be; a stage that has
# ended already is not run again. The sizes fit two cores; STEPS, RL_STEPS, BATCH, PROMPT, TOKENS, LIMIT
# and PREFIX change them.
set -eu
pairs=${1:?"expected a file of pairs: $0 pairs.jsonl.gz [MODEL]"}
model=${2:-builtin:smollm2-135m-instruct}
steps=${STEPS:-24} rl_steps=${RL_STEPS:-10} batch=${BATCH:-8}
prompt=${PROMPT:-72} tokens=${TOKENS:-128} limit=${LIMIT:-1200} prefix=${PREFIX:-hh}

model_of() {
    set -- runs/"$1"/checkpoints/step-*/model
    for folder; do :; done
    echo "$folder"
}
stage() {
    command=$1 name=$prefix-$2
    shift 2
    [ -f "runs/$name/summary.json" ] || apportion "$command" run_name="$name" data.train="$pairs" data.on_bad_row=skip \
        data.eval_share=0.03 data.eval_limit=24 data.limit="$limit" data.max_prompt_tokens="$prompt" \
        data.max_tokens="$tokens" train.steps="$steps" train.batch_size="$batch" "$@"
}
learn() {
    recipe=$1
    shift
    [ -f "runs/$prefix-$recipe/summary.json" ] || apportion train experiment="$recipe" run_name="$prefix-$recipe" \
        "data.train=[{source: 'function:apportion.data.pairs:prompts_of', path: '$pairs', limit: $limit}]" data.eval=null \
        data.on_bad_row=skip data.max_prompt_tokens="$prompt" rollout.max_response_tokens=$((tokens - prompt)) \
        train.steps="$rl_steps" train.prompts_per_step="$batch" model.path="$tuned" \
        reward.functions="model:$(model_of "$prefix-reward")" "$@"
}

stage sft sft model.path="$model" policy.learning_rate=2e-5
tuned=$(model_of "$prefix-sft")
stage reward-model reward model.path="$tuned" policy.learning_rate=2e-5
stage dpo dpo model.path="$tuned" policy.learning_rate=1e-5
stage dpo reverse model.path="$tuned" policy.learning_rate=1e-5 dpo.reverse=true
learn ma_rlhf critic.warmup_steps_without_policy=2
learn aligndistil before=[] teachers.dpo="$(model_of "$prefix-dpo")" teachers.other="$(model_of "$prefix-reverse")"
