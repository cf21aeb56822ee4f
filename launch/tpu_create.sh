#!/usr/bin/env bash
# Request a TPU slice as a queued resource and wait until it is there.
#   launch/tpu_create.sh --name=salcl --zone=us-central2-b --type=v4-32 [--spot] [--dry-run]
set -euo pipefail

name=salcl zone="" type="" version="" project="" spot="" dry="" wait_minutes=120
usage() {
  sed -n '2,3p' "$0" | cut -c3-
  echo "  also: --version=RUNTIME --project=ID --wait-minutes=N"
}
for arg in "$@"; do
  case $arg in
    --name=*) name=${arg#*=} ;;
    --zone=*) zone=${arg#*=} ;;
    --type=*) type=${arg#*=} ;;
    --version=*) version=${arg#*=} ;;
    --project=*) project=${arg#*=} ;;
    --wait-minutes=*) wait_minutes=${arg#*=} ;;
    --spot) spot=--spot ;;
    --dry-run) dry=1 ;;
    -h|--help) usage; exit 0 ;;
    *) echo "tpu_create.sh: unknown argument $arg" >&2; usage >&2; exit 2 ;;
  esac
done
[[ -n $zone && -n $type ]] || { echo "tpu_create.sh: --zone and --type are needed" >&2; exit 2; }

if [[ -z $version ]]; then  # runtime image that belongs to the chip generation
  case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
common=("--zone=$zone")
[[ -z $project ]] || common+=("--project=$project")
create=(gcloud compute tpus queued-resources create "$name" "--node-id=$name"
  "--accelerator-type=$type" "--runtime-version=$version" "${common[@]}")
[[ -z $spot ]] || create+=("$spot")
describe=(gcloud compute tpus queued-resources describe "$name" "${common[@]}"
  "--format=value(state.state)")

if [[ -n $dry ]]; then
  printf '%q ' "${create[@]}"; echo
  printf '%q ' "${describe[@]}"; echo
  exit 0
fi
"${create[@]}"
for ((i = 0; i < 2 * wait_minutes; i++)); do
  state=$("${describe[@]}")
  echo "$(date +%T) $name: $state"
  case $state in
    ACTIVE) exit 0 ;;
    FAILED|SUSPENDED) exit 1 ;;
  esac
  sleep 30
done
echo "tpu_create.sh: $name is still not active; it stays in the queue" >&2
exit 1
