#!/usr/bin/env bash
# Start the run on GKE as a JobSet: fills tpu/jobset.yaml from the settings and hands it to kubectl.
#   tpu/jobset.sh --image REGION-docker.pkg.dev/PROJECT/REPO/e5v-jax --bucket my-bucket
#
# The cluster needs the JobSet controller (https://jobset.sigs.k8s.io) and the Cloud Storage FUSE
# driver. Watch it with: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
parse_flags "$@"
[[ -n $IMAGE ]] || fail "--image is needed: build tpu/Dockerfile and push it"
[[ -n $BUCKET ]] || fail "--bucket is needed: the run folder must outlive the pods"
[[ $COMMAND != *'"'* ]] || fail "the command may not hold a double quote: it becomes YAML"

chips=1
for side in ${TOPOLOGY//x/ }; do chips=$((chips * side)); done
((chips % CHIPS_PER_HOST == 0)) || fail "--topology $TOPOLOGY is no multiple of --chips-per-host"
# shellcheck disable=SC2034  # read by fill_template through SETTINGS
HOSTS=$((chips / CHIPS_PER_HOST))
SETTINGS+=(HOSTS)

manifest=$(fill_template "$TPU_DIR/jobset.yaml")
if [[ -n $PRINT ]]; then
  echo "kubectl apply -f - <<'EOF'"
  echo "$manifest"
  echo EOF
else
  kubectl apply -f - <<<"$manifest"
fi
