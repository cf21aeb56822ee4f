#!/usr/bin/env bash
# Keep a run going on a TPU slice that may be taken away: create the slice, set it up, start the run
# detached and watch it; where the slice is lost or the run saved and ended, do so again.
#   launch/tpu_resume.sh --name=salcl --zone=us-central2-b --type=v4-32 [--spot] [--attempts=10]
#     [--every=60] [--project=ID] [--version=RUNTIME] [--wait-minutes=120] [--dry-run] -- \
#     --config=configs/coco.py --workdir=gs://BUCKET/runs/one
# Ends with the program's code when that is 0 (done), 2 or 70 (to be mended); the slice stays.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

attempts=10 every=60 type="" options=(--wait-minutes=120)
name=""  # no default: a slice of this name may be deleted
while (($#)); do
  case $1 in
    --attempts=*) attempts=${1#*=} ;;
    --every=*) every=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*|--wait-minutes=*|--spot) options+=("$1") ;;
    --) shift; break ;;
    *) flag_of_slice "$1" || stop "unknown argument $1 (arguments of the program go after --)" ;;
  esac
  shift
done
check_slice
[[ -n $type && $# -gt 0 ]] || stop "--type, and the program's arguments after --, are needed"
[[ $attempts =~ ^[0-9]+$ && $every =~ ^[0-9]+$ ]] || stop "--attempts and --every are whole numbers"

slice=("--name=$name" "${place[@]}")
[[ -z $dry ]] || slice+=(--dry-run)
delete() { "$here/tpu_delete.sh" "${slice[@]}"; }
create() { "$here/tpu_create.sh" "${slice[@]}" "--type=$type" "${options[@]}"; }
setup() { "$here/tpu_setup.sh" "${slice[@]}"; }
start() { "$here/tpu_run.sh" "${slice[@]}" --detach -- "$@"; }
status() { on_workers all "bash ~/salcl_jax/launch/worker.sh status"; }
say() { echo "$(date +%T) $script: $1"; }

# The slice is there and set up, or this attempt has failed.
prepare() {
  local state; state=$(slice_state)
  while [[ $state =~ ^(SUSPENDING|DELETING|UNKNOWN)$ ]]; do sleep "$every"; state=$(slice_state); done
  case $state in
    ACTIVE) [[ -n $installed ]] || setup; return ;;
    FAILED|SUSPENDED) delete || return ;;
  esac
  create && setup
}

# Returns when the run should be started again; ends the script where that is no use.
watch() {
  local codes misses=0
  while sleep "$every"; do
    if ! codes=$(status); then
      [[ $(slice_state) =~ ^(ACTIVE|UNKNOWN)$ ]] || { say "the slice is lost"; return; }
      ((++misses < 30)) || { say "no connection for long"; return; }
      say "no connection; the run may be well" && continue
    fi
    misses=0 codes=" $(sed -n 's/^status: //p' <<< "$codes" | sort -u | tr '\n' ' ')"
    case $codes in
      *" running "*) ;;
      " 0 ") say "the run is done (exit code 0)"; exit 0 ;;
      *" 70 "*) stop "the run failed (exit code 70); its log says why: tpu_logs.sh" 70 ;;
      *" 2 "*) stop "the program ended with exit code 2; mend what its log says: tpu_logs.sh" 2 ;;
      *) say "ended with:$codes"; return ;;
    esac
  done
}

if [[ -n $dry ]]; then slice_state; delete; create; setup; start "$@"; status; exit 0; fi
[[ $(slice_state) != UNKNOWN ]] || stop "gcloud cannot tell whether $name exists; see above" 1
installed=1  # taken for granted on a slice that is there, until a start fails
for ((attempt = 1; attempt <= attempts; attempt++)); do
  say "attempt $attempt of $attempts"
  code=1
  if prepare; then code=0; start "$@" || code=$?; fi
  ((code != 3)) || stop "another run is alive on $name; end it with tpu_stop.sh" 3
  if ((code)); then installed="" && sleep "$every"; else installed=1 && watch; fi
done
stop "gave up after $attempts attempts; the slice, if any, is still there" 75
