"""The fields of the evaluation protocols, each explained once, with its default."""

import ml_collections

from salcl_jax.config_source import source

ConfigDict = ml_collections.ConfigDict


def tasks() -> ConfigDict:
    """What `python -m salcl_jax.evaluate` does; images are `eval.size`, features those of `eval.branch`."""
    c = ConfigDict()
    c.summary = ("linear", "knn", "voc_svm", "multilabel", "localization")  # what --task=summary runs
    c.baselines = ("untrained", "pixels")  # judged beside the network: same seed untrained, raw pixels
    # what linear and knn see of a test photo: center (0.875 of the short side) | whole (squashed); semi sees
    # the first, voc_svm and multilabel the second
    c.view = "center"
    c.pixels = 16  # side that photos are reduced to for the raw-pixel baseline
    c.limit = 0  # photos per set, evenly spread; 0 is all
    c.max_boxes = 128  # annotated objects kept per photo
    c.cache = ""  # folder of cached features; '' is ~/.cache/salcl_jax/features, 'none' keeps nothing
    c.jobs = -1  # processes of scikit-learn; -1 is one per core

    c.classify = ConfigDict()  # labelled photos of linear, knn and (as test set) semi
    c.classify.train = source("tfds", name="imagenet2012", split="train")  # fitted on
    c.classify.test = source("tfds", name="imagenet2012", split="validation")  # reported on
    c.classify.on = "image"  # what a label belongs to: image | object (crops of annotated boxes)

    c.knn = ConfigDict()  # weighted nearest neighbours (Wu et al. 2018)
    c.knn.k = (20, 10, 100, 200)  # neighbours; the first is the headline
    c.knn.temperature = 0.07  # a neighbour votes with exp(cosine / temperature)
    c.knn.bank_rows = 262_144  # training features on the devices at a time; results do not depend on it

    c.linear = ConfigDict()  # probe on frozen features
    # sgd: many rates in one pass, the best by a held-out tenth of train (at most 10,000) | orl,
    # orl_places205, orl_inat18: five levels, 28 / 14 / 84 epochs (Goyal et al. 2019) | lbfgs: logistic
    c.linear.protocol = "sgd"
    c.linear.epochs = 90  # sgd: passes over train; the rate falls by a cosine
    c.linear.batch_size = 1024  # sgd: examples per step
    c.linear.rates = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # sgd: for a batch of 256, all in one pass
    c.linear.optimizer = "sgd"  # sgd: sgd | lars
    c.linear.weight_decay = 0.0  # sgd
    c.linear.batch_norm = False  # sgd: BatchNorm without scale and shift before the classifier
    c.linear.augment = True  # sgd: new crops and flips through the frozen network; False: cached features
    c.linear.levels = ("pooled",)  # sgd: any of pooled, conv1, stage1 .. stage4; each with every rate
    c.linear.l2 = (1e-4, 1e-3, 1e-2, 1e-1)  # lbfgs: penalties, the best by a held-out fifth of train
    c.linear.subsets = ()  # few labels, by lbfgs: 'fold_1pct=0..4' averages over these rows of `labels`

    c.semi = ConfigDict()  # fine-tuning with few labels (ORL); tested on classify.test
    c.semi.train = source("tfds", name="imagenet2012_subset/1pct", split="train")  # the labelled photos
    c.semi.folds = ""  # 'fold_1pct=0..4' averages over those rows of the `labels` file; '' takes all
    c.semi.rates = (0.001, 0.01, 0.1)  # of the network, for a batch of 256
    c.semi.multipliers = (1.0, 10.0, 100.0)  # of the classifier's rate
    c.semi.weight_decay = 5e-4  # ORL: 5e-4 for 1 %, 1e-4 for 10 % of the labels
    c.semi.epochs = 20  # passes over the labelled photos
    c.semi.milestones = (12, 16)  # epochs after which rates fall to a fifth
    c.semi.batch_size = 256  # photos per step
    # held_out: by a fifth of the labelled photos, then trained on all | test: ORL's habit, best on test
    c.semi.choose = "held_out"

    c.voc_svm = ConfigDict()  # one linear SVM per class (VOC 2007), cost by 3-fold cross-validation
    c.voc_svm.train = source("tfds", name="voc/2007", split="train+validation")  # fitted on
    c.voc_svm.test = source("tfds", name="voc/2007", split="test")  # reported on
    c.voc_svm.levels = ("stage4",)  # the headline first: conv1, stage1 .. stage4 (average pools), pooled
    c.voc_svm.shots = (1, 2, 4, 8, 16, 32, 64, 96)  # positives per class, low-shot curve; () leaves it out
    c.voc_svm.samples = 5  # independent draws of them

    c.multilabel = ConfigDict()  # which classes does a photo show? one-vs-rest logistic regression
    c.multilabel.train = source("tfds", name="coco/2017", split="train")  # photos with boxes
    c.multilabel.test = source("tfds", name="coco/2017", split="validation")  # reported on
    c.multilabel.l2 = (1e-4, 1e-3, 1e-2, 1e-1)  # penalties, the best by a held-out fifth of train

    c.localization = ConfigDict()  # do the map and its regions find the objects?
    c.localization.test = source("tfds", name="coco/2017", split="validation")  # photos with boxes
    c.localization.gallery = 4  # best, median and worst photos drawn, each so many; 0 draws none

    c.segmentation = ConfigDict()  # linear probe on the features of each location
    c.segmentation.train = source("folder")  # photos with masks of classes; name `roots` and `masks`
    c.segmentation.test = source("folder")  # reported on
    c.segmentation.classes = 21  # with the background, class 0
    c.segmentation.size = 448  # side in pixels of the photos
    c.segmentation.stages = ("stage4",)  # stages joined on the grid of the finest
    c.segmentation.rates = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # for a batch of 256
    c.segmentation.epochs = 20  # passes over train
    c.segmentation.batch_size = 1024  # locations per step
    return c


def small_tasks(c: ConfigDict) -> None:
    """What takes minutes on two CPU cores, beside the small network."""
    c.linear.augment = False
    c.linear.batch_size = 256
    c.voc_svm.shots = (1, 4, 16, 64)
    c.semi.batch_size = 64
    c.segmentation.size = 96
    c.segmentation.stages = ("stage3", "stage4")
