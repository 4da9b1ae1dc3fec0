#!/usr/bin/env bash
# One run on Slurm: sbatch --nodes=2 deploy/slurm.sh experiment=gsm8k runs_folder=/shared/runs cluster.policy_ranks=8 cluster.rollout_engines=8
# Arguments go to `apportion train`. Submit from the repository, which lies with its .venv on a folder that all nodes see.
#SBATCH --job-name=apportion
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=08:00:00
#SBATCH --output=apportion-%j.log
set -euo pipefail
# What the run writes is for you and your group; 077 keeps it to yourself.
umask 027

cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate

# A token of this job alone; srun gives the environment to every node.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN_PATH=$(mktemp "$HOME/.ray-token-$SLURM_JOB_ID-XXXXXX")
export RAY_AUTH_TOKEN_PATH
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
chmod 600 "$RAY_AUTH_TOKEN_PATH"
python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# As the head itself knows it: /etc/hosts may give its name an address that no other node reaches.
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{print $1}'):6379
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # the first import from a shared disk takes minutes

# The run ends by itself, with a checkpoint, a quarter of an hour before Slurm would end it: resume=RUN goes on.
minutes=$(((SLURM_JOB_END_TIME - $(date +%s)) / 60 - 15))

# Starts Ray on every node, runs the command on the first one, and stops Ray when it ends (everyone's of this user on
# these nodes, hence --exclusive above).
srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_NNODES" -- \
    apportion train cluster.address="$address" train.max_minutes="$minutes" "$@"
