#!/usr/bin/env bash
# Copy the committed source to all workers of a TPU slice and install it there.
#   launch/tpu_setup.sh --name=salcl --zone=us-central2-b [--project=ID] [--python=3.12] [--dry-run]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

python=3.12
for arg in "$@"; do
  case $arg in
    --python=*) python=${arg#*=} ;;
    *) flag_of_slice "$arg" || stop "unknown argument $arg" ;;
  esac
done
check_slice
[[ $python =~ ^3\.[0-9]+$ ]] || stop "--python=$python is not a version like 3.12"

archive=${TMPDIR:-/tmp}/salcl_jax-$UID-$name.tar.gz
[[ -n $dry ]] || trap 'rm -f "$archive"' EXIT

# The images' own Python is too old for this jax, so uv brings one.
install="set -e; mkdir -p ~/salcl_jax; tar -xzf ~/salcl_jax.tar.gz -C ~/salcl_jax"
install+="; python3 -m pip install --quiet --user uv"
install+="; ~/.local/bin/uv venv --quiet --allow-existing --python $python ~/venv"
install+="; ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -e ~/salcl_jax'[tpu]'"
install+="; ~/venv/bin/python -c 'import salcl_jax, jax; print(\"jax\", jax.__version__)'"

run git -C "$(dirname "$here")" archive --format=tar.gz "--output=$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:salcl_jax.tar.gz" "${place[@]}" --worker=all
on_workers all "$install"
