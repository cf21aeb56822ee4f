#!/usr/bin/env bash
# Prepare photos in a folder or bucket, and count them.
#   launch/prepare_data.sh --data=coco|coco_plus|imagenet --data-dir=gs://BUCKET/tfds [--manual=DIR] \
#     [--work-dir=DIR] [--dry-run]
# coco: TFDS records of coco/2017 (25 GB, twice more while it works). coco_plus: the folders train2017 and
# unlabeled2017 (38 GB). imagenet: TFDS records of imagenet2012 (150 GB); imagenet_1pct, imagenet_10pct: its
# labelled subsets. --manual=DIR takes the archives from a local folder; only coco can do without. Without it
# coco_plus only counts what lies in the data folder. --work-dir: where archives are unpacked, local.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

data="" data_dir="" manual="" work=""
for arg in "$@"; do
  case $arg in
    --data=*) data=${arg#*=} ;;
    --data-dir=*) data_dir=${arg#*=} ;;
    --manual=*) manual=${arg#*=} ;;
    --work-dir=*) work=${arg#*=} ;;
    *) flag_of_all "$arg" || stop "unknown argument $arg" ;;
  esac
done
archives="ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar"
case $data in
  coco)
    build=(coco/2017 train=118287 validation=5000)
    archives="train2017.zip val2017.zip test2017.zip annotations_trainval2017.zip image_info_test2017.zip" ;;
  coco_plus) archives="train2017.zip unlabeled2017.zip" ;;
  imagenet) build=(imagenet2012 train=1281167 validation=50000) ;;
  imagenet_1pct) build=(imagenet2012_subset/1pct train=12811 validation=50000) ;;
  imagenet_10pct) build=(imagenet2012_subset/10pct train=128116 validation=50000) ;;
  *) stop "--data=$data: say coco, coco_plus, imagenet, imagenet_1pct or imagenet_10pct" ;;
esac
[[ -n $data_dir ]] || stop "--data-dir is needed"
[[ -n $manual || $data != imagenet* ]] || stop "$data cannot be downloaded: put $archives in DIR, give --manual=DIR"
if [[ -n $manual && -z $dry ]]; then
  for archive in $archives; do
    [[ -f $manual/$archive ]] || stop "no $manual/$archive; --data=$data needs $archives there" 1
  done
fi
# Archives stay on a local disk even when the result goes to a bucket.
case $data_dir in
  *://*) bucket=1 work=${work:-${TMPDIR:-/tmp}/salcl_jax_data} ;;
  *) bucket="" work=${work:-$data_dir/downloads} ;;
esac
python=${SALCL_PYTHON:-python}

if [[ $data != coco_plus ]]; then
  options=("--data_dir=$data_dir" "--work_dir=$work")
  [[ -z $manual ]] || options+=("--manual_dir=$manual")
  run "$python" "$here/prepare_data.py" tfds "${build[@]}" "${options[@]}"
  exit 0
fi
for part in train2017=118287 unlabeled2017=123403; do
  folder=${part%=*}
  if [[ -n $manual ]]; then
    unpacked=$data_dir
    [[ -z $bucket ]] || unpacked=$work
    run mkdir -p "$unpacked"
    run "$python" -m zipfile -e "$manual/$folder.zip" "$unpacked"
    [[ -z $bucket ]] || run gcloud storage rsync --recursive "$work/$folder" "$data_dir/$folder"
  fi
  run "$python" "$here/prepare_data.py" folder "$data_dir/$folder" "${part#*=}"
done
