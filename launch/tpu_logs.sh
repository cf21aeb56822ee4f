#!/usr/bin/env bash
# Follow the output of a detached run, each line with the number of its worker; Ctrl-C ends only this.
#   launch/tpu_logs.sh --name=salcl --zone=us-central2-b [--worker=all|0|0-3] [--lines=20]
#     [--project=ID] [--dry-run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

worker=all lines=20
for arg in "$@"; do
  case $arg in
    --worker=*) worker=${arg#*=} ;;
    --lines=*) lines=${arg#*=} ;;
    *) flag_of_slice "$arg" || stop "unknown argument $arg" ;;
  esac
done
check_slice
[[ $lines =~ ^[0-9]+$ ]] || stop "--lines=$lines is not a whole number"

# gcloud mixes the workers' lines without a name. A worker's host name ends in its number (...-w-3).
on_workers "$worker" "tail -n $lines -F ~/salcl_jax.log | sed -u \"s/^/worker \${HOSTNAME##*-}: /\""
