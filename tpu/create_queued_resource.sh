#!/usr/bin/env bash
# Ask for a TPU slice: tpu/create_queued_resource.sh --accelerator v5litepod-32 --capacity spot
#
# Returns at once; tpu/babysit.sh waits for the slice and starts the run on it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
parse_flags "$@"

# https://cloud.google.com/tpu/docs/runtimes
case $ACCELERATOR in
  v5litepod-*) default_runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) default_runtime=v2-alpha-tpuv5 ;;
  v6e-*) default_runtime=v2-alpha-tpuv6e ;;
  v4-*) default_runtime=tpu-ubuntu2204-base ;;
  *) [[ -n $RUNTIME ]] || fail "--accelerator $ACCELERATOR: not known here, so give --runtime too" ;;
esac

flags=(--node-id "$NAME" --accelerator-type "$ACCELERATOR"
  --runtime-version "${RUNTIME:-${default_runtime:-}}")
case $CAPACITY in
  spot) flags+=(--spot) ;;
  reserved) flags+=(--reserved) ;;
  on-demand) ;;
  *) fail "--capacity $CAPACITY: expected spot, reserved or on-demand" ;;
esac
[[ -z $VALID_UNTIL ]] || flags+=(--valid-until-duration "$VALID_UNTIL")

gcloud_tpu queued-resources create "${flags[@]}"
