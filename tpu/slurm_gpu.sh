#!/usr/bin/env bash
# Train on GPU nodes under Slurm, one process a GPU:
#   sbatch --nodes 2 tpu/slurm_gpu.sh --config configs/e5v_llama3_8b.py --output runs/e5v
#
# Run from the checkout, with the environment in .venv (pip install -e ".[cuda]"), base model and data
# where the configuration says (or --model, --data). Slurm's SIGTERM makes the run save; --requeue then
# starts it again, and it resumes.
#SBATCH --job-name=e5v
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# There is no bucket here: what is not given is the configuration's.
MODEL=${MODEL-}
DATA=${DATA-}
OUTPUT=${OUTPUT:-runs/e5v}
# Slurm runs a copy of this file from elsewhere, but in the folder sbatch was called from.
# shellcheck source=env.sh
source "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}/tpu/env.sh"
parse_flags "$@"

# JAX finds coordinator, rank and local GPU in Slurm's own variables.
run srun --kill-on-bad-exit=1 bash -c "source .venv/bin/activate && exec $COMMAND"
