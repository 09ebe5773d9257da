#!/usr/bin/env bash
# Start the run with xpk (https://github.com/AI-Hypercomputer/xpk) on a cluster that xpk made:
#   tpu/xpk.sh --cluster my-cluster --image REGION-docker.pkg.dev/PROJECT/REPO/e5v-jax
#
# xpk's own storage commands attach the bucket; give --model and --output as it mounts them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
parse_flags "$@"
[[ -n $CLUSTER ]] || fail "--cluster is needed: xpk cluster create makes one"
[[ -n $IMAGE ]] || fail "--image is needed: build tpu/Dockerfile and push it"

run xpk workload create --cluster "$CLUSTER" --workload "$NAME" --zone "$ZONE" \
  ${PROJECT:+--project "$PROJECT"} --tpu-type "$ACCELERATOR" --num-slices "$SLICES" \
  --docker-image "$IMAGE" --max-restarts 100 --command "$COMMAND"
