#!/usr/bin/env bash
# Delete a TPU slice and its queued resource. Buckets are left alone.
#   launch/tpu_delete.sh --name=salcl --zone=us-central2-b [--dry-run]
set -euo pipefail

name="" zone="" project="" dry=""
for arg in "$@"; do
  case $arg in
    --name=*) name=${arg#*=} ;;
    --zone=*) zone=${arg#*=} ;;
    --project=*) project=${arg#*=} ;;
    --dry-run) dry=1 ;;
    -h|--help) sed -n '2,3p' "$0" | cut -c3-; exit 0 ;;
    *) echo "tpu_delete.sh: unknown argument $arg" >&2; exit 2 ;;
  esac
done
# No default name here: what is deleted must have been typed.
[[ -n $name && -n $zone ]] || { echo "tpu_delete.sh: --name and --zone are needed" >&2; exit 2; }

# --force deletes the slice together with the request for it.
command=(gcloud compute tpus queued-resources delete "$name" "--zone=$zone" --force --quiet)
[[ -z $project ]] || command+=("--project=$project")
if [[ -n $dry ]]; then
  printf '%q ' "${command[@]}"; echo
else
  "${command[@]}"
fi
