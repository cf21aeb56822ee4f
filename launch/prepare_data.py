"""Build a TFDS data set, or look at a folder of photos, and count what is there.

python launch/prepare_data.py tfds coco/2017 train=118287 validation=5000 --data_dir=OUT --work_dir=DIR
python launch/prepare_data.py folder train2017 118287

One line and exit code 1 where the count is another. `prepare_data.sh` calls it. Not the `tfds` command: a
data set that is there already is only counted here, and archives given with --manual_dir are not downloaded.
"""

import argparse
import sys


def build(name: str, counts: list[str], data_dir: str, work_dir: str, manual_dir: str | None) -> None:
    """Prepares `name` in `data_dir` unless it is there, then compares counts like 'train=118287'."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(download_dir=work_dir, download_config=config)
    for count in counts:
        split, _, expected = count.partition("=")
        found = builder.info.splits[split].num_examples
        check(f"{name}:{split} in {data_dir}", found, int(expected), f"delete {builder.data_dir}")


def count_folder(root: str, expected: int) -> None:
    """Counts the photos below `root` as a folder source does."""
    from salcl_jax.data import files

    mend = "give --manual=DIR with its zip file"
    try:
        found = len(files.list_images(root))
    except (FileNotFoundError, ValueError):
        sys.exit(f"error: {root}: no photos there; {mend}")
    check(root, found, expected, mend)


def check(what: str, found: int, expected: int, mend: str) -> None:
    """Ends the program with one line where the count is another."""
    if found != expected:
        sys.exit(f"error: {what}: {found} images instead of {expected}; {mend} and run this again")
    print(f"{what}: {found} images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    tfds = kinds.add_parser("tfds")
    tfds.add_argument("name")
    tfds.add_argument("counts", nargs="+", metavar="SPLIT=N")
    tfds.add_argument("--data_dir", required=True)
    tfds.add_argument("--work_dir", required=True)
    tfds.add_argument("--manual_dir")
    folder = kinds.add_parser("folder")
    folder.add_argument("root")
    folder.add_argument("count", type=int)
    args = parser.parse_args()
    if args.kind == "tfds":
        build(args.name, args.counts, args.data_dir, args.work_dir, args.manual_dir)
    else:
        count_folder(args.root, args.count)


if __name__ == "__main__":
    main()
