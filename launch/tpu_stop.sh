#!/usr/bin/env bash
# Tell the run on a TPU slice to save and end (SIGTERM, exit code 75). The slice stays.
#   launch/tpu_stop.sh --name=salcl --zone=us-central2-b [--project=ID] [--dry-run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

for arg in "$@"; do
  flag_of_slice "$arg" || stop "unknown argument $arg"
done
check_slice
on_workers all "bash ~/salcl_jax/launch/worker.sh stop"
