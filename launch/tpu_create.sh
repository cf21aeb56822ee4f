#!/usr/bin/env bash
# Request a TPU slice as a queued resource and wait until it is there.
#   launch/tpu_create.sh --name=salcl --zone=us-central2-b --type=v4-32 [--spot] [--dry-run]
#     [--project=ID] [--version=RUNTIME] [--wait-minutes=120]
# A request of that name that exists already is waited for, not made again.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

type="" version="" spot="" wait_minutes=120
for arg in "$@"; do
  case $arg in
    --type=*) type=${arg#*=} ;;
    --version=*) version=${arg#*=} ;;
    --wait-minutes=*) wait_minutes=${arg#*=} ;;
    --spot) spot=--spot ;;
    *) flag_of_slice "$arg" || stop "unknown argument $arg" ;;
  esac
done
check_slice
[[ -n $type ]] || stop "--type is needed, for example v4-32, v5litepod-16, v5p-32 or v6e-16"
[[ $wait_minutes =~ ^[0-9]+$ ]] || stop "--wait-minutes=$wait_minutes is not a whole number"

if [[ -z $version ]]; then  # runtime image that belongs to the chip generation
  case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
create=(gcloud compute tpus queued-resources create "$name" "--node-id=$name"
  "--accelerator-type=$type" "--runtime-version=$version" "${place[@]}")
[[ -z $spot ]] || create+=("$spot")

if [[ -n $dry ]]; then
  slice_state
  run "${create[@]}"
  exit 0
fi
state=$(slice_state)
case $state in
  NONE) "${create[@]}" ;;
  UNKNOWN) stop "gcloud cannot tell whether $name exists; see above" 1 ;;
  *) echo "$name exists already: $state" ;;
esac
for ((i = 0; i <= 2 * wait_minutes; i++)); do
  state=$(slice_state)
  echo "$(date +%T) $name: $state"
  case $state in
    ACTIVE) exit 0 ;;
    FAILED|SUSPENDING|SUSPENDED|DELETING)
      stop "$name will not become active ($state); delete it with tpu_delete.sh and create it again" 1 ;;
  esac
  sleep 30
done
stop "$name is not active after $wait_minutes minutes; it stays in the queue, the same command waits on" 1
