#!/usr/bin/env bash
# Install this checkout (its committed files) on every host of the slice, in ~/e5v-jax with its own
# Python, and mount BUCKET at ~/e5v-jax/bucket if there is one.
#
# May run again: it replaces the code and keeps the environment. The bucket needs a hierarchical
# namespace, see tpu/README.md.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
parse_flags "$@"

archive=$(mktemp -t e5v-jax.XXXXXX.tar.gz)
trap 'rm -f "$archive"' EXIT
run git -C "$TPU_DIR/.." archive --format tar.gz --output "$archive" HEAD

run gcloud compute tpus tpu-vm scp "$archive" "$NAME:e5v-jax.tar.gz" \
  --worker=all --zone "$ZONE" ${PROJECT:+--project "$PROJECT"}

# TPU images bring Python 3.10; uv fetches a newer one without touching it.
install='set -e
mkdir -p ~/e5v-jax && cd ~/e5v-jax
tar -xzf ~/e5v-jax.tar.gz
python3 -m pip install --quiet --user uv
test -d .venv || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --editable ".[tpu]"'
on_all_hosts "$install"

if [[ -n $BUCKET ]]; then
  # A name of a checkpoint must be seen by all hosts as soon as one has renamed it: no caching.
  on_all_hosts "set -e
cd ~/e5v-jax && mkdir -p bucket
mountpoint -q bucket || gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 $BUCKET bucket"
fi
