#!/usr/bin/env bash
# What the tpu_*.sh scripts call on each worker. The run's files are ~/salcl_jax.{log,exit,command,pid,lock}.
#   launch/worker.sh run [--detach] [--dry-run] -- ARGUMENTS    python -m salcl_jax.main, one at a time
#   launch/worker.sh status    running, the exit code of the last run, or none
#   launch/worker.sh stop      SIGTERM to the run: it saves and ends with 75
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

detach="" action=${1:-}
while (($#)); do
  case $1 in
    run|status|stop) action=$1 ;;
    --detach) detach=1 ;;
    --) shift; break ;;
    *) flag_of_all "$1" || stop "unknown argument $1" ;;
  esac
  shift
done
command=("$HOME/venv/bin/python" -m salcl_jax.main "$@" --config.distributed=auto)

# Held by the run and its program for as long as either lives, however they end.
lock() { flock -w "$1" 9; }

# One line a run: what it is, to tell the same run from another.
line() { printf '%q ' "${command[@]}"; }

work() {
  trap : TERM  # outlive the program, to note how it ended
  local code=0
  cd ~/salcl_jax
  # shellcheck disable=SC2016  # the inner shell expands it: the pid is the program's own
  bash -c 'echo $$ > ~/salcl_jax.pid; exec "$@"' - "${command[@]}" || code=$?
  echo "$code" > ~/salcl_jax.exit
  return "$code"
}

start() {
  if ! lock 2; then
    # gcloud starts the command again when a connection breaks: the same run is then no error.
    [[ -n $detach && $(line) == "$(cat ~/salcl_jax.command)" ]] ||
      stop "a run is alive on this worker; follow it with tpu_logs.sh or end it with tpu_stop.sh" 3
    echo "this run is alive already"
    exit 0
  fi
  rm -f ~/salcl_jax.exit
  line > ~/salcl_jax.command
  if [[ -n $detach ]]; then
    (trap '' HUP; work) >> ~/salcl_jax.log 2>&1 < /dev/null &
  else
    work
  fi
}

status() {
  if ! lock 0; then
    echo "status: running"
  else
    echo "status: $(cat ~/salcl_jax.exit 2> /dev/null || echo none)"
  fi
}

if [[ -n $dry ]]; then run "${command[@]}"; exit 0; fi
exec 9>> ~/salcl_jax.lock
case $action in
  run) (($#)) || stop "the program's arguments are needed after --"; start ;;
  status) status ;;
  stop) if lock 0; then echo "no run is alive here"; else kill -TERM "$(cat ~/salcl_jax.pid)"; fi ;;
  *) stop "say run, status or stop" ;;
esac
