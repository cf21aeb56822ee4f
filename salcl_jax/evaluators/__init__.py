"""How good the features and the maps are."""

# The figures that are shown on the terminal; summary.json and metrics.jsonl have all.
HEADLINES = (
    "pretext/loss", "pretext/spread", "knn/top1", "linear/top1", "localization/pointing",
    "localization/corloc", "localization/best_iou", "localization/inside_ratio",
)  # fmt: skip
