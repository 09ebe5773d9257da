#!/usr/bin/env bash
# Run one command on every host of the slice, in the checkout that tpu/setup_vm.sh put there:
#   tpu/run_all_workers.sh                                   trains, or goes on with the run
#   tpu/run_all_workers.sh -- python tpu/smoke_test.py       anything else
#
# Shows the hosts' output, and fails if the command fails on any of them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
parse_flags "$@"

on_all_hosts "cd ~/e5v-jax && source .venv/bin/activate && $COMMAND"
