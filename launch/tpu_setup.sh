#!/usr/bin/env bash
# Copy the committed source to all workers of a TPU slice and install it there.
#   launch/tpu_setup.sh --name=salcl --zone=us-central2-b [--python=3.12] [--dry-run]
set -euo pipefail

name=salcl zone="" project="" python=3.12 dry=""
for arg in "$@"; do
  case $arg in
    --name=*) name=${arg#*=} ;;
    --zone=*) zone=${arg#*=} ;;
    --project=*) project=${arg#*=} ;;
    --python=*) python=${arg#*=} ;;
    --dry-run) dry=1 ;;
    -h|--help) sed -n '2,3p' "$0" | cut -c3-; exit 0 ;;
    *) echo "tpu_setup.sh: unknown argument $arg" >&2; exit 2 ;;
  esac
done
[[ -n $zone ]] || { echo "tpu_setup.sh: --zone is needed" >&2; exit 2; }

run() { if [[ -n $dry ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }

common=("--zone=$zone" --worker=all)
[[ -z $project ]] || common+=("--project=$project")
root=$(cd "$(dirname "$0")/.." && pwd)
archive=/tmp/salcl_jax.tar.gz
if [[ -z $dry ]]; then
  scratch=$(mktemp -d); archive=$scratch/salcl_jax.tar.gz
  trap 'rm -rf "$scratch"' EXIT
fi

# The images' own Python is too old for this jax, so uv brings one.
install="set -e; mkdir -p ~/salcl_jax; tar -xzf ~/salcl_jax.tar.gz -C ~/salcl_jax
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python $python ~/venv
~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -e ~/salcl_jax 'jax[tpu]'
~/venv/bin/python -c 'import salcl_jax, jax; print(\"jax\", jax.__version__)'"

run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:~/salcl_jax.tar.gz" "${common[@]}"
run gcloud compute tpus tpu-vm ssh "$name" "${common[@]}" "--command=$install"
