#!/usr/bin/env bash
# Settings of the launch scripts, and the few lines they share.
#
# Change a setting here, export it, or give it as a flag of any script: --zone us-west4-a sets ZONE.
# A word after -- replaces COMMAND. Run on its own, this file shows the settings.

PROJECT=${PROJECT:-}                        # Google Cloud project; empty: gcloud's default
ZONE=${ZONE:-us-west4-a}                    # where the slice is
NAME=${NAME:-e5v}                           # of the queued resource, its TPU node and the job
ACCELERATOR=${ACCELERATOR:-v5litepod-32}    # gcloud's name of the slice; v5p and v4 count cores
RUNTIME=${RUNTIME:-}                        # TPU software version; empty: the accelerator's own
CAPACITY=${CAPACITY:-spot}                  # spot, reserved or on-demand
VALID_UNTIL=${VALID_UNTIL:-}                # give up if not granted within, say 6h; empty: never
BUCKET=${BUCKET:-}                          # Cloud Storage bucket mounted at bucket/ in the checkout
CONFIG=${CONFIG:-configs/e5v_llama3_8b.py}  # training configuration
MODEL=${MODEL-bucket/models/llava-next-llama3-8b} # converted base model; empty: CONFIG's
DATA=${DATA-bucket/data/nli_for_simcse.csv} # training rows; empty: CONFIG's
OUTPUT=${OUTPUT:-bucket/runs/e5v}           # run folder, shared by all hosts
COMMAND=${COMMAND:-}                        # what every host runs; empty: train, resuming OUTPUT
INTERVAL=${INTERVAL:-60}                    # seconds between two looks at the slice
MAX_FAILURES=${MAX_FAILURES:-3}             # give up after so many failures that were no preemption
CLUSTER=${CLUSTER:-}                        # GKE cluster
IMAGE=${IMAGE:-}                            # container image, built from tpu/Dockerfile
SLICES=${SLICES:-1}                         # slices of a GKE job
TOPOLOGY=${TOPOLOGY:-4x8}                   # of one GKE slice
GKE_ACCELERATOR=${GKE_ACCELERATOR:-tpu-v5-lite-podslice} # GKE's name of the chip
CHIPS_PER_HOST=${CHIPS_PER_HOST:-4}         # TPU chips of one GKE node
PRINT=${PRINT:-}                            # not empty: show the commands, run none (--print)

SETTINGS=(PROJECT ZONE NAME ACCELERATOR RUNTIME CAPACITY VALID_UNTIL BUCKET CONFIG MODEL DATA
  OUTPUT COMMAND INTERVAL MAX_FAILURES CLUSTER IMAGE SLICES TOPOLOGY GKE_ACCELERATOR CHIPS_PER_HOST)

TPU_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# One line on stderr, then exit 2 (usage) or the given code.
fail() {
  echo "error: $1" >&2
  exit "${2:-2}"
}

# The comment at the top of the script $0, then the settings with their values.
show_help() {
  sed -n '2,/^[^#]/ { s/^# \{0,1\}//p; }' "$0"
  printf '\nFlags and their values now (--print shows the commands and runs none):\n'
  local name
  for name in "${SETTINGS[@]}"; do
    printf '  --%-16s %-26s %s\n' "$(tr '[:upper:]_' '[:lower:]-' <<<"$name")" \
      "${!name:-(empty)}" "$(sed -n "s/^$name=[^#]*# //p" "$TPU_DIR/env.sh")"
  done
}

# Flags into settings; what follows -- is the COMMAND.
parse_flags() {
  local flag name known
  while (($#)); do
    flag=$1
    shift
    case $flag in
      --help | -h)
        show_help
        exit 0
        ;;
      --print) PRINT=1 ;;
      --)
        COMMAND=$*
        break
        ;;
      --*)
        name=$(tr '[:lower:]-' '[:upper:]_' <<<"${flag#--}")
        known=" ${SETTINGS[*]} "
        [[ $known == *" $name "* ]] || fail "unknown flag $flag; --help lists them"
        (($#)) || fail "$flag needs a value"
        printf -v "$name" '%s' "$1"
        shift
        ;;
      *) fail "unexpected word '$flag'; flags begin with --, a command follows --" ;;
    esac
  done
  if [[ -z $COMMAND ]]; then
    COMMAND="python -m e5v_jax.train --config $CONFIG${MODEL:+ --model $MODEL}${DATA:+ --data.path $DATA}"
    COMMAND+=" --output $OUTPUT --resume"
  fi
  [[ $INTERVAL =~ ^[0-9]+$ ]] || fail "--interval $INTERVAL: expected seconds"
  [[ $MAX_FAILURES =~ ^[0-9]+$ ]] || fail "--max-failures $MAX_FAILURES: expected a number"
}

# Run a command, or with --print show it so that a shell would take it back.
run() {
  if [[ -n $PRINT ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# gcloud compute tpus GROUP COMMAND NAME --zone ... : "$1" and "$2" first, further flags after.
gcloud_tpu() {
  local group=$1 command=$2
  shift 2
  run gcloud compute tpus "$group" "$command" "$NAME" \
    --zone "$ZONE" ${PROJECT:+--project "$PROJECT"} "$@"
}

# Run "$1" with bash on every host of the slice, output and exit code included.
on_all_hosts() {
  gcloud_tpu tpu-vm ssh --worker=all --command "$1"
}

# The template "$1" with each ${SETTING} in it filled in.
fill_template() {
  local text name
  text=$(<"$1")
  for name in "${SETTINGS[@]}"; do
    text=${text//"\${$name}"/${!name}}
  done
  printf '%s\n' "$text"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  parse_flags "$@"
  show_help
fi
