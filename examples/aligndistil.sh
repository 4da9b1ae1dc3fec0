#!/bin/sh
# AlignDistil from nothing: two teachers by DPO, one on the pairs as they are and one on them reversed, then the student.
# Run it where runs/ is to be; what is there already is not trained again. About 12 minutes on two cores.
set -eu
here=$(dirname "$0")
teacher() {
    name=$1
    shift
    [ -d "runs/$name/checkpoints" ] || apportion dpo model.path=builtin:smollm2-135m-instruct \
        data.train="function:$here/arithmetic_pairs.py:pairs" data.max_prompt_tokens=96 data.max_tokens=160 \
        train.steps=16 train.batch_size=16 policy.learning_rate=5e-6 run_name="$name" "$@"
}
teacher aligndistil-dpo
teacher aligndistil-reverse dpo.reverse=true
apportion train experiment=aligndistil "$@"
