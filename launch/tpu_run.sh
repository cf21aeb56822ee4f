#!/usr/bin/env bash
# Run python -m salcl_jax.main on all workers of a TPU slice; arguments after -- are passed on.
#   launch/tpu_run.sh --name=salcl --zone=us-central2-b [--detach] [--dry-run] -- \
#     --config=configs/coco.py --workdir=gs://BUCKET/runs/one
# --detach leaves it running after the connection ends, with the output in ~/salcl_jax.log.
set -euo pipefail

name=salcl zone="" project="" detach="" dry=""
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --detach) detach=1 ;;
    --dry-run) dry=1 ;;
    -h|--help) sed -n '2,5p' "$0" | cut -c3-; exit 0 ;;
    --) shift; break ;;
    *) echo "tpu_run.sh: unknown argument $1 (arguments of the program go after --)" >&2; exit 2 ;;
  esac
  shift
done
[[ -n $zone ]] || { echo "tpu_run.sh: --zone is needed" >&2; exit 2; }
(($#)) || { echo "tpu_run.sh: the program's arguments are needed after --" >&2; exit 2; }

# A pod needs every worker: started on one alone, jax waits for the others until its time-out.
program="cd ~/salcl_jax && exec ~/venv/bin/python -m salcl_jax.main"
program+=$(printf ' %q' "$@" --config.distributed=auto)
if [[ -n $detach ]]; then
  program="nohup bash -c $(printf '%q' "$program") > ~/salcl_jax.log 2>&1 < /dev/null & sleep 2"
fi
command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$program")
[[ -z $project ]] || command+=("--project=$project")

if [[ -n $dry ]]; then
  printf '%q ' "${command[@]}"; echo
else
  "${command[@]}"
fi
