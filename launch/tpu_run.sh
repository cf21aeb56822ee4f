#!/usr/bin/env bash
# Run python -m salcl_jax.main on all workers of a TPU slice; arguments after -- are passed on.
#   launch/tpu_run.sh --name=salcl --zone=us-central2-b [--project=ID] [--detach] [--dry-run] -- \
#     --config=configs/coco.py --workdir=gs://BUCKET/runs/one
# --detach leaves it running after the connection ends, with the output in ~/salcl_jax.log and its exit
# code in ~/salcl_jax.exit on each worker. Exit code 3: a run is alive there already.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

detach=""
while (($#)); do
  case $1 in
    --detach) detach=" --detach" ;;
    --) shift; break ;;
    *) flag_of_slice "$1" || stop "unknown argument $1 (arguments of the program go after --)" ;;
  esac
  shift
done
check_slice
(($#)) || stop "the program's arguments are needed after --"

# A pod needs every worker: started on one alone, jax waits for the others until its time-out.
on_workers all "bash ~/salcl_jax/launch/worker.sh run$detach --$(printf ' %q' "$@")"
