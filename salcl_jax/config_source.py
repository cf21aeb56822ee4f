"""The fields of a data source: used for training, for each evaluation set and for each task."""

import ml_collections

ConfigDict = ml_collections.ConfigDict


def source(kind: str = "none", **fields) -> ConfigDict:
    """Where images come from; used for training and for each evaluation set."""
    c = ConfigDict()
    c.kind = kind  # tfds | folder | arrays | scenes | none
    c.name = ""  # tfds: data set, e.g. coco/2017
    c.split = ""  # tfds, scenes: '' is train; folder: rows of the `labels` file with this split, '' is all
    c.data_dir = ""  # tfds, scenes: where data sets are kept; '' is that of data.train, or the tfds default
    c.roots = ()  # folder: one or several folders, searched recursively
    c.annotations = ""  # folder: COCO-style JSON with boxes, 'a.json,b.json' joins; only photos listed there
    c.labels = ""  # folder: CSV with columns file, label[, split]
    c.where = ""  # folder: 'column=value[,column=value]' keeps those rows of the `labels` file
    c.list = ""  # folder: text file with the names of the photos to keep, each with a class number or none
    c.masks = ""  # folder: folder of PNG label maps with the photos' names; 0 background, 255 unknown
    c.regions = ""  # folder: CSV of segmentations (BSDS): enclosed regions become objects; joins annotations
    c.label_from_folder = False  # folder: the parent folder's name is the class
    c.path = ""  # arrays: .npz, or a folder of .npy files, with `image` and optional label, boxes, classes
    c.expected = 0  # number of images that must be found; 0 does not check
    c.scenes = ConfigDict()  # scenes: the dials of the built-in scenes
    c.scenes.size = 96  # side in pixels
    c.scenes.num_classes = 10  # of at most 16
    c.scenes.objects = (1, 4)  # fewest and most objects of an image
    c.scenes.object_size = (0.25, 0.5)  # side of an object, in image sides
    c.scenes.repeat = 0.5  # probability that a further object is of the first one's class
    c.scenes.clutter = 0.5  # 0 none .. 1 heavy: objects of no class, specks and strokes
    c.scenes.num_train = 2000  # images of the train split
    c.scenes.num_val = 500  # images of the validation split
    c.scenes.seed = 0  # the same seed and dials give the same images
    for name, value in fields.items():
        c[name] = value
    return c
