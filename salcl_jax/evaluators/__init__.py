"""How good the features and the maps are."""

# The figures that are shown on the terminal while training; summary.json and metrics.jsonl have all.
HEADLINES = (
    "pretext/loss", "pretext/spread", "knn/top1", "linear/top1", "localization/pointing",
    "localization/corloc", "localization/best_iou", "localization/inside_ratio",
)  # fmt: skip

# The tasks of `salcl_jax.evaluate`, and the sections of `tasks` that name their photos.
TASKS = {
    "linear": ("classify.train", "classify.test"),
    "knn": ("classify.train", "classify.test"),
    "semi": ("semi.train", "classify.test"),
    "voc_svm": ("voc_svm.train", "voc_svm.test"),
    "multilabel": ("multilabel.train", "multilabel.test"),
    "localization": ("localization.test",),
    "crops": ("localization.test",),
    "segmentation": ("segmentation.train", "segmentation.test"),
}
