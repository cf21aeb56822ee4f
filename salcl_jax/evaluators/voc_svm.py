"""Linear SVMs on frozen features for image-level labels: the VOC07 protocol, full and low-shot.

(Goyal et al. 2019, arXiv 1905.01235; costs and class weights as in OpenSelfSup and ORL.)
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from salcl_jax.evaluators import average_precision
from salcl_jax.evaluators.average_precision import Examples

COSTS = (*(0.5**power for power in range(19, 3, -1)), 1.0, 10.0, 100.0)
CLASS_WEIGHT = {1: 2, -1: 1}
NEGATIVES = 19  # negatives for each positive of a low-shot sample


class Plan(NamedTuple):
    """What is tried for every class; costs ascend."""

    costs: tuple[float, ...]
    folds: int
    shots: tuple[int, ...]
    samples: int
    seed: int
    max_iter: int


class Result(NamedTuple):
    """One class: its cost, its test scores, and the low-shot ones of every k it has images for."""

    cost: float
    ap: float
    ap_11_point: float
    chosen: dict[int, np.ndarray]  # k: test AP [samples], each sample's cost chosen on train
    table: dict[int, np.ndarray]  # k: test AP [samples, costs]


def evaluate(
    train: Examples,
    test: Examples,
    *,
    class_names: Sequence[str],
    costs: Sequence[float] = COSTS,
    folds: int = 3,
    shots: Sequence[int] = (),
    samples: int = 5,
    jobs: int = 1,
    seed: int = 0,
    max_iter: int = 2000,
) -> dict[str, float]:
    """Test average precision of one SVM a class, named 'voc_svm/...'; deterministic.

    train, test: (features float [n, d], labels int [n, c] as of average_precision.image_labels);
    an ignored example is left out for its class, in both sets. Features are x / (|x| + 1e-5).
    Each class takes the cost of the best mean average precision ('plain') over `folds`
    stratified, unshuffled folds of `train`, the smallest among equals, and is fitted to all of
    `train` with it. Fewer positives (or negatives) than folds: two folds; only one of them: the
    middle of the costs, untried.
    Figures: 'map' and 'ap/<class>' (all-point), 'map_11_point', 'cost/<class>', 'classes' (how many
    count). A class counts if `train` has positives and negatives of it and `test` has positives;
    the others are NaN and in no mean.

    Low-shot, for each k of `shots`: `samples` samples a class of k positives and 19 k negatives of
    `train` (all negatives where there are fewer; a class of fewer than k positives is left out),
    drawn from (seed, class, k, sample). 'low_shot/<k>' is the mean test AP (all-point) over
    samples and classes, each at the cost of the best AP ('plain') on the training images outside
    the sample: the middle one where all positives are in it, and the one of a cross-validation
    within it, as above, where all negatives are.
    'low_shot_best_on_test/<k>' is the figure of the literature: the mean test AP of the one cost
    that makes it largest, which looks at the test labels.

    jobs: processes, a class each at a time (-1: all cores; 1 starts none). Raises ValueError for
    sets that do not fit together, features that are not finite, settings out of range, or where
    scikit-learn is not installed.
    """
    average_precision.check("voc_svm", train, test, class_names)
    plan = Plan(tuple(sorted(costs)), folds, tuple(shots), samples, seed, max_iter)
    _check(plan, jobs)
    x, x_test = _unit(train[0]), _unit(test[0])
    labels, test_labels = train[1], test[1]
    counts = average_precision.learnable(labels) & np.any(test_labels == 1, axis=0)
    counted = np.flatnonzero(counts).tolist()
    results = _each([(x, labels[:, c], x_test, test_labels[:, c], c, plan) for c in counted], jobs)
    return _figures(dict(zip(counted, results, strict=True)), class_names, plan)


def draw(positive: np.ndarray, k: int, seed: tuple[int, ...]) -> np.ndarray:
    """Sorted indices of k of the positives and 19 k (or all) of the negatives of bool [n]."""
    rng = np.random.default_rng(seed)
    some = rng.permutation(np.flatnonzero(positive))[:k]
    others = rng.permutation(np.flatnonzero(~positive))[: NEGATIVES * k]
    return np.sort(np.concatenate([some, others]))


def _each(arguments: list[tuple], jobs: int) -> list[Result]:
    from joblib import Parallel, delayed

    return Parallel(n_jobs=jobs)(delayed(_one_class)(*each) for each in arguments)


def _one_class(
    x: np.ndarray, labels: np.ndarray, x_test: np.ndarray, test_labels: np.ndarray, index: int,
    plan: Plan,
) -> Result:  # fmt: skip
    known, tested = labels >= 0, test_labels >= 0
    positive, truth = labels[known] == 1, test_labels[tested] == 1
    x = x if known.all() else x[known]

    def on_test(weights) -> np.ndarray:
        # Choosing rows of the scores, not of the features, spares a copy of the whole test set.
        return _scores(weights, x_test)[tested]

    cost = plan.costs[_choose(x, positive, plan)]
    scores = on_test(_fit(x, positive, (cost,), plan.max_iter))[:, 0]
    chosen, table = {}, {}
    for k in plan.shots:
        if positive.sum() < k:
            continue
        at, values = [], []
        for sample in range(plan.samples):
            picked = draw(positive, k, (plan.seed, index, k, sample))
            weights = _fit(x[picked], positive[picked], plan.costs, plan.max_iter)
            at.append(_choose_outside(picked, weights, x, positive, plan))
            values.append(_each_cost(average_precision.all_point, on_test(weights), truth))
        table[k] = np.array(values)
        chosen[k] = table[k][np.arange(plan.samples), at]
    return Result(
        cost, average_precision.all_point(scores, truth),
        average_precision.eleven_point(scores, truth), chosen, table,
    )  # fmt: skip


def _choose(x: np.ndarray, positive: np.ndarray, plan: Plan) -> int:
    """Index of the cost of best average precision in cross-validation."""
    from sklearn.model_selection import StratifiedKFold

    rarer = min(positive.sum(), len(positive) - positive.sum())
    if rarer < 2 or len(plan.costs) == 1:
        return _middle(len(plan.costs))
    folds = StratifiedKFold(plan.folds if rarer >= plan.folds else 2)
    values = []
    for fit_on, held_out in folds.split(x, positive):
        weights = _fit(x[fit_on], positive[fit_on], plan.costs, plan.max_iter)
        scores = _scores(weights, x[held_out])
        values.append(_each_cost(average_precision.plain, scores, positive[held_out]))
    return _best(np.mean(values, axis=0))


def _choose_outside(
    picked: np.ndarray, weights, x: np.ndarray, positive: np.ndarray, plan: Plan
) -> int:
    """Index of the cost of best average precision on the training images that were not picked."""
    rest = np.delete(np.arange(len(x)), picked)
    if not positive[rest].any():
        return _middle(len(plan.costs))
    if positive[rest].all():
        return _choose(x[picked], positive[picked], plan)
    scores = _scores(weights, x[rest])
    return _best(_each_cost(average_precision.plain, scores, positive[rest]))


def _best(values: np.ndarray) -> int:
    """The first of the largest; what differs by rounding alone is equal."""
    return int(np.argmax(values >= values.max() - 1e-12))


def _middle(count: int) -> int:
    return (count - 1) // 2


def _fit(
    x: np.ndarray, positive: np.ndarray, costs: Sequence[float], max_iter: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [d, costs] and biases [costs] of the SVM of each cost."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    settings = {"loss": "squared_hinge", "dual": True, "tol": 1e-4, "random_state": 0}
    y = np.where(positive, 1, -1)
    with warnings.catch_warnings():
        # The protocol stops after 2000 steps, converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        models = [LinearSVC(C=cost, class_weight=CLASS_WEIGHT, max_iter=max_iter, **settings)
                  .fit(x, y) for cost in costs]
    return np.stack([m.coef_[0] for m in models], 1), np.array([m.intercept_[0] for m in models])


def _scores(weights: tuple[np.ndarray, np.ndarray], x: np.ndarray) -> np.ndarray:
    return x @ weights[0] + weights[1][None]


def _each_cost(metric, scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    return np.array([metric(column, positive) for column in scores.T])


def _unit(features: np.ndarray) -> np.ndarray:
    """x / (|x| + 1e-5) in the layout and precision that liblinear takes without a conversion."""
    x = np.ascontiguousarray(features, np.float64)
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)


def _figures(
    results: dict[int, Result], class_names: Sequence[str], plan: Plan
) -> dict[str, float]:
    nan = float("nan")
    lost = Result(nan, nan, nan, {}, {})
    every = [results.get(index, lost) for index in range(len(class_names))]
    figures = {
        "map": average_precision.mean(np.array([result.ap for result in every])),
        "map_11_point": average_precision.mean(np.array([r.ap_11_point for r in every])),
        "classes": float(len(results)),
    }
    for k in plan.shots:
        able = [result for result in results.values() if k in result.table]
        figures[f"low_shot/{k}"] = (
            float(np.mean([result.chosen[k] for result in able])) if able else nan
        )
        figures[f"low_shot_best_on_test/{k}"] = (
            float(np.mean([r.table[k] for r in able], axis=(0, 1)).max()) if able else nan
        )
    for name, result in zip(class_names, every, strict=True):
        figures[f"ap/{name}"] = result.ap
        figures[f"cost/{name}"] = result.cost
    return {f"voc_svm/{name}": value for name, value in figures.items()}


def _check(plan: Plan, jobs: int) -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "voc_svm: scikit-learn is not installed; pip install scikit-learn"
        ) from error
    if not plan.costs or not all(0 < cost < float("inf") for cost in plan.costs):
        raise ValueError(f"voc_svm: costs={plan.costs} must name at least one cost, each positive")
    if plan.folds < 2 or plan.max_iter < 1 or plan.seed < 0 or not jobs:
        raise ValueError(
            f"voc_svm: folds={plan.folds} (2 or more), max_iter={plan.max_iter} (1 or more), "
            f"seed={plan.seed} (0 or more) or jobs={jobs} (not 0) is out of range"
        )
    if plan.shots and (min(plan.shots) < 1 or plan.samples < 1):
        raise ValueError(
            f"voc_svm: shots={plan.shots} and samples={plan.samples} must be 1 or more"
        )
