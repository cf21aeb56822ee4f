#!/usr/bin/env bash
# Build the tfds records of coco/2017 in a folder or bucket (25 GB, twice more while it works).
#   launch/prepare_coco.sh --data-dir=gs://BUCKET/tfds [--manual=DIR] [--dry-run]
# --manual=DIR takes the five zip files of COCO 2017 from a local folder, downloading nothing.
set -euo pipefail

data_dir="" manual="" work="" dry=""
for arg in "$@"; do
  case $arg in
    --data-dir=*) data_dir=${arg#*=} ;;
    --manual=*) manual=${arg#*=} ;;
    --work-dir=*) work=${arg#*=} ;;
    --dry-run) dry=1 ;;
    -h|--help) sed -n '2,4p' "$0" | cut -c3-; exit 0 ;;
    *) echo "prepare_coco.sh: unknown argument $arg" >&2; exit 2 ;;
  esac
done
[[ -n $data_dir ]] || { echo "prepare_coco.sh: --data-dir is needed" >&2; exit 2; }

# Downloads and unpacked zips stay on a local disk even when the records go to a bucket.
if [[ -z $work ]]; then
  case $data_dir in
    *://*) work=${TMPDIR:-/tmp}/coco_downloads ;;
    *) work=$data_dir/downloads ;;
  esac
fi
if [[ -n $manual && -z $dry ]]; then
  for name in train2017 val2017 test2017 annotations_trainval2017 image_info_test2017; do
    [[ -f $manual/$name.zip ]] || { echo "prepare_coco.sh: no $manual/$name.zip" >&2; exit 1; }
  done
fi

# Not the tfds command line: that one wants Apache Beam, which this data set does not need.
code='
import sys
import tensorflow_datasets as tfds
data_dir, work, manual = sys.argv[1:]
builder = tfds.builder("coco/2017", data_dir=data_dir)
config = tfds.download.DownloadConfig(manual_dir=manual or None)
builder.download_and_prepare(download_dir=work, download_config=config)
found = builder.info.splits["train"].num_examples
if found != 118287:
    sys.exit(f"train2017 has {found} images instead of 118287: delete the folder and build again")
print("coco/2017 is ready: 118287 training images")
'
command=("${SALCL_PYTHON:-python}" -c "$code" "$data_dir" "$work" "$manual")
if [[ -n $dry ]]; then
  printf '%q ' "${command[@]}"; echo
else
  "${command[@]}"
fi
