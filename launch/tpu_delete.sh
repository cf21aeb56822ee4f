#!/usr/bin/env bash
# Delete a TPU slice and its queued resource. Buckets are left alone.
#   launch/tpu_delete.sh --name=salcl --zone=us-central2-b [--project=ID] [--dry-run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

name=""  # no default here: what is deleted must have been typed
for arg in "$@"; do
  flag_of_slice "$arg" || stop "unknown argument $arg"
done
check_slice

# --force deletes the slice together with the request for it.
run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
