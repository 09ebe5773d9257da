#!/usr/bin/env bash
# Delete the slice and its queued resource, so that nothing is paid for any longer.
#
# Checkpoints in the bucket stay.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
parse_flags "$@"

gcloud_tpu queued-resources delete --force --quiet
