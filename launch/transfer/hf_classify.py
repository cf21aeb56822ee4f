"""Fine-tune an exported backbone as a classifier with Hugging Face's Trainer.

python -m salcl_jax.export --checkpoint=runs/one --to=huggingface --out=backbone
python launch/transfer/hf_classify.py --weights=backbone --photos=photos --labels=labels.csv --out=classifier
The CSV has the columns file, label and split (train, val). Without --labels, PHOTOS/train and PHOTOS/val have
a folder for each class. The classifier and its metrics are written to --out. Needs torch and
`pip install -e .[huggingface]`.
"""

import argparse
import os

import numpy as np
import torch
import transformers
from PIL import Image

from salcl_jax.data import decode
from salcl_jax.data.sources import Source, open_source

MAX_PIXELS = 200_000_000  # of a photo; larger ones are passed over


class Photos(torch.utils.data.Dataset):
    """A labelled source as Trainer wants it: pixel_values [3, s, s] and a label."""

    def __init__(self, source: Source, prepare: transformers.BaseImageProcessor, crop: bool):
        self.source, self.prepare, self.crop = source, prepare, crop
        self.size = prepare.size["shortest_edge"]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict:
        example, photo = self._usable(i)
        if self.crop:  # the processor's resize and crop change nothing any more
            photo = random_crop(photo, self.size)
            pixels = self.prepare(photo, do_resize=False, return_tensors="pt")
        else:
            pixels = self.prepare(photo, return_tensors="pt")
        return {"pixel_values": pixels["pixel_values"][0], "labels": example["label"]}


    def _usable(self, i: int) -> tuple[dict, Image.Image]:
        """Photo i, or the next one that can be read; OSError where none of a hundred can."""
        for k in range(100):
            try:
                example = self.source.read((i + k) % len(self))
                # Twice the side: a crop is a part of the photo, and the processor shrinks the whole.
                return example, decode.decode(example["encoded"], 2 * self.size, max_pixels=MAX_PIXELS).image
            except (decode.SkipImage, OSError) as error:
                print(f"passed over: {self.source.place(i + k)}: {error}", flush=True)
        raise OSError(f"{self.source.name}: a hundred photos in a row cannot be read")


def random_crop(photo: Image.Image, size: int) -> Image.Image:
    """A crop of 8 to 100 % of the area and aspect 3/4 to 4/3, mirrored half of the time, size x size."""
    for _ in range(10):
        area = photo.width * photo.height * torch.empty(1).uniform_(0.08, 1.0).item()
        aspect = np.exp(torch.empty(1).uniform_(np.log(3 / 4), np.log(4 / 3)).item())
        width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < width <= photo.width and 0 < height <= photo.height:
            break
    else:
        width = height = min(photo.size)
    left = int(torch.randint(photo.width - width + 1, ()))
    top = int(torch.randint(photo.height - height + 1, ()))
    crop = photo.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else crop


def open_photos(options: argparse.Namespace) -> tuple[Source, Source]:
    """Photos to train and to test on."""
    if options.labels:
        spec = {"kind": "folder", "roots": (options.photos,), "labels": options.labels}
        train, test = (open_source(spec | {"split": split}) for split in ("train", "val"))
    else:
        spec, folders = {"kind": "folder", "label_from_folder": True}, ("train", "val")
        train, test = (open_source(spec | {"roots": (os.path.join(options.photos, f),)}) for f in folders)
    if train.class_names != test.class_names:
        raise ValueError(f"{options.photos}: the classes of train and val differ")
    return train, test


def optimizer(model: torch.nn.Module, lr: float, head: float) -> torch.optim.Optimizer:
    """SGD; the new classifier learns `head` times as fast as the backbone."""
    new = {"params": model.classifier.parameters(), "lr": head * lr}
    return torch.optim.SGD([{"params": model.resnet.parameters()}, new], lr, momentum=0.9, weight_decay=1e-4)


def top1(predicted: transformers.EvalPrediction) -> dict[str, float]:
    """Share of the photos whose largest logit is the label's."""
    return {"top1": float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))}


def fine_tune(options: argparse.Namespace) -> dict[str, float]:
    """Train and test; returns the figures of the test."""
    train, test = open_photos(options)
    names = dict(enumerate(train.class_names))
    model = transformers.ResNetForImageClassification.from_pretrained(
        options.weights, num_labels=len(names), id2label=names, label2id={n: i for i, n in names.items()}
    )
    prepare = transformers.AutoImageProcessor.from_pretrained(options.weights)
    settings = transformers.TrainingArguments(
        output_dir=options.out, seed=options.seed, report_to="none", remove_unused_columns=False,
        num_train_epochs=options.epochs, max_steps=options.steps, lr_scheduler_type="cosine",
        per_device_train_batch_size=options.batch_size, per_device_eval_batch_size=options.batch_size,
        dataloader_num_workers=options.workers, logging_steps=options.log_every,
        save_strategy="epoch", save_total_limit=1,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, settings, train_dataset=Photos(train, prepare, crop=True), compute_metrics=top1,
        eval_dataset=Photos(test, prepare, crop=False),
        optimizers=(optimizer(model, options.lr, options.head), None),
    )  # fmt: skip
    trainer.train()
    figures = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("eval", figures)
    prepare.save_pretrained(options.out)
    return figures


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", required=True, help="folder written by export --to=huggingface")
    parser.add_argument("--photos", required=True, help="folder of photos")
    parser.add_argument("--labels", help="CSV with file, label, split")
    parser.add_argument("--out", required=True, help="folder for the classifier")
    parser.add_argument("--epochs", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=-1, help="instead of epochs")
    parser.add_argument("--batch-size", type=int, default=64, help="on each device")
    parser.add_argument("--lr", type=float, default=0.01, help="of the backbone")
    parser.add_argument("--head", type=float, default=10.0, help="the classifier's rate over the backbone's")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        print(fine_tune(parse()))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
