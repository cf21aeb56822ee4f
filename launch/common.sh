# shellcheck shell=bash disable=SC2034
# What the scripts of this folder share; they source it. Kept to what the bash 3.2 of macOS knows.
script=${0##*/}
here=$(cd "$(dirname "$0")" && pwd)
name=salcl zone="" project="" dry=""

# Something to mend in the command, or in what was found: one line and the exit code.
stop() {
  echo "$script: $1" >&2
  exit "${2:-2}"
}

# Take a flag that all scripts have; false where it is none.
flag_of_all() {
  case $1 in
    --dry-run) dry=1 ;;
    -h|--help) sed -n -e '2,$ { /^#/!q; s/^# \{0,1\}//p; }' "$0"; exit 0 ;;
    *) return 1 ;;
  esac
}

# The same for the scripts that work on a TPU slice.
flag_of_slice() {
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    *) flag_of_all "$1" ;;
  esac
}

# After the flags: which slice the gcloud commands mean.
check_slice() {
  [[ -n $name ]] || stop "--name is needed"
  [[ -n $zone ]] || stop "--zone is needed"
  place=("--zone=$zone")
  [[ -z $project ]] || place+=("--project=$project")
}

# Run a command, or print it in the dry run.
run() {
  if [[ -n $dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# on_workers all|I|I-J COMMAND
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"
}

# State of the slice: gcloud's word for the request (ACTIVE, ...), SUSPENDED also where only the machines
# are gone, NONE without a request, UNKNOWN where gcloud could not tell (it says why on stderr).
slice_state() {
  local answer machines
  local request=(gcloud compute tpus queued-resources describe "$name" "${place[@]}" "--format=value(state.state)")
  local node=(gcloud compute tpus tpu-vm describe "$name" "${place[@]}" "--format=value(state)")
  if [[ -n $dry ]]; then
    run "${request[@]}"
    run "${node[@]}"
  elif answer=$("${request[@]}" 2>&1); then
    answer=$(grep -xE '[A-Z_]+' <<< "$answer") || answer=UNKNOWN  # warnings may stand around it
    if [[ $answer == ACTIVE ]] && machines=$("${node[@]}") && [[ $machines =~ ^(PREEMPTED|TERMINATED)$ ]]; then
      answer=SUSPENDED
    fi
    echo "$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}
