#!/usr/bin/env bash
# Keep a run going until it ends: ask for the slice, wait for it, install, run the command, and after
# a preemption do it all again. The run goes on from its newest checkpoint.
#
# Exits 0 when the command did; 1 after MAX_FAILURES failures on a slice that was still there.
# Start it in tmux or with nohup: the run stops with it, and goes on when it is started again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
parse_flags "$@"
for name in "${SETTINGS[@]}"; do
  export "${name?}" # the other scripts take them from here
done

# State of the queued resource; "NONE" if there is none.
state() {
  local answer
  if answer=$(gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" \
    ${PROJECT:+--project "$PROJECT"} --format='value(state.state)' 2>&1); then
    echo "${answer:-UNKNOWN}"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo NONE
  else
    echo "UNREACHABLE"
    echo "$answer" >&2
  fi
}

say() { echo "$(date '+%F %T') $NAME: $1"; }

if [[ -n $PRINT ]]; then
  export PRINT
  echo "# when there is no slice"
  "$TPU_DIR/create_queued_resource.sh"
  echo "# every $INTERVAL s until ACTIVE"
  gcloud_tpu queued-resources describe "--format=value(state.state)"
  echo "# when it is there"
  "$TPU_DIR/setup_vm.sh"
  "$TPU_DIR/run_all_workers.sh" -- "$COMMAND"
  echo "# after a preemption, then from the top"
  "$TPU_DIR/teardown.sh"
  exit 0
fi

failures=0
while true; do
  now=$(state)
  case $now in
    NONE)
      say "asking for $CAPACITY $ACCELERATOR"
      "$TPU_DIR/create_queued_resource.sh" || say "not granted, trying again in $INTERVAL s"
      ;;
    ACTIVE)
      say "installing and running: $COMMAND"
      if "$TPU_DIR/setup_vm.sh" && "$TPU_DIR/run_all_workers.sh" -- "$COMMAND"; then
        say "finished"
        exit 0
      fi
      if [[ $(state) == ACTIVE ]]; then
        failures=$((failures + 1))
        say "failed on a slice that is still there ($failures of $MAX_FAILURES)"
        ((failures < MAX_FAILURES)) || fail "$COMMAND failed $failures times; the slice is kept" 1
      else
        say "preempted"
        continue # do not wait: the sooner asked for again, the sooner granted
      fi
      ;;
    SUSPENDED | FAILED)
      say "$now: deleting it to ask for another"
      "$TPU_DIR/teardown.sh" || say "could not delete it, trying again in $INTERVAL s"
      [[ $(state) != NONE ]] || continue
      ;;
    *) say "$now" ;; # queued, being made or unmade, or gcloud out of reach
  esac
  sleep "$INTERVAL"
done
