"""How good answers are, and how sure that is. Legend: N samples, M metrics, K classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax

Array = np.ndarray[Any, Any]

RESAMPLES = 1000
SEED = 0  # of the resampling
LEVEL = 0.95  # of the intervals
BINS = 15  # of confidence, equally wide
FEWEST_BLOCKS = 10  # of a sequence, to say anything of chance


def judge_means(names: Sequence[str], values_NM: Array, block: int = 1) -> dict[str, Any]:
    """Return the mean of each metric with its interval, as plain values.

    Args:
        names: of the metrics.
        values_NM: of each sample.
        block: samples in a row that are drawn together, because their errors are alike: those of a sequence.
    """
    starts = np.arange(0, len(values_NM), block)
    sums = np.add.reduceat(values_NM.astype(np.float64), starts, axis=0)
    sizes = np.diff(np.append(starts, len(values_NM)))
    bounds = None
    if block == 1 or len(starts) >= FEWEST_BLOCKS:
        bounds = bootstrap(lambda weights: weights @ sums / (weights @ sizes), len(starts))
    means = sums.sum(axis=0) / len(values_NM)
    return {
        name: {"value": float(means[place]), "interval": None if bounds is None else bounds[:, place].tolist()}
        for place, name in enumerate(names)
    }


def count_confusions(labels_N: Array, predictions_N: Array, num_classes: int) -> Array:
    """Return how often which class was taken for which, int64 [K, K]; a row for each true class."""
    from sklearn.metrics import confusion_matrix

    counts: Array = confusion_matrix(labels_N, predictions_N, labels=range(num_classes))
    return counts


def judge_classifier(logits_NK: Array, labels_N: Array, class_names: Sequence[str]) -> dict[str, Any]:
    """Return metrics with intervals, scores of each class, the confusion matrix and the calibration, as plain values.

    Classes without a sample count in no mean over classes.
    """
    from sklearn.metrics import precision_recall_fscore_support, top_k_accuracy_score

    log_probabilities_NK = log_softmax(logits_NK.astype(np.float64), axis=1)
    num_samples, num_classes = logits_NK.shape
    predictions_N = logits_NK.argmax(axis=1)
    own_N = log_probabilities_NK[np.arange(num_samples), labels_N]
    values = {"loss": -own_N, "accuracy": (predictions_N == labels_N).astype(np.float64)}
    if num_classes > 5:
        values["top_5_accuracy"] = ((log_probabilities_NK > own_N[:, None]).sum(axis=1) < 5).astype(np.float64)
    points = {name: float(of_samples.mean()) for name, of_samples in values.items()}
    if num_classes > 5:
        every = range(num_classes)
        points["top_5_accuracy"] = float(top_k_accuracy_score(labels_N, log_probabilities_NK, k=5, labels=every))
    precision_K, recall_K, f1_K, support_K = precision_recall_fscore_support(
        labels_N, predictions_N, labels=range(num_classes), zero_division=0
    )
    present_K = support_K > 0
    points["macro_f1"] = float(f1_K[present_K].mean())

    measured = np.stack(list(values.values()), axis=1)
    of_weights = weigh(measured, labels_N, predictions_N, num_classes)
    bounds = bootstrap(of_weights, num_samples)
    count = len(points)
    calibration = calibrate(np.exp(log_probabilities_NK), labels_N)
    metrics = {
        name: {"value": value, "interval": bounds[:, place].tolist()}
        for place, (name, value) in enumerate(points.items())
    }
    classes = []
    for number, name in enumerate(class_names):
        scores: dict[str, Any] = {"name": name, "support": int(support_K[number])}
        for place, (score, of_class) in enumerate((("precision", precision_K), ("recall", recall_K), ("f1", f1_K))):
            interval = bounds[:, count + place * num_classes + number].tolist() if present_K[number] else None
            scores[score] = {"value": float(of_class[number]), "interval": interval}
        classes.append(scores)
    return {
        "metrics": metrics,
        "classes": classes,
        "calibration": calibration,
        "confusion_matrix": count_confusions(labels_N, predictions_N, num_classes).tolist(),
    }


def weigh(measured_NM: Array, labels_N: Array, predictions_N: Array, num_classes: int) -> Callable[[Array], Array]:
    """Return what computes, of samples that count so and so often, the means, macro F1, and the scores of classes.

    The result is [M + 1 + 3 K]: then precision, recall and F1 of each class; NaN of a class that no sample is of.
    """
    right_N = labels_N == predictions_N

    def compute(weights_N: Array) -> Array:
        def count(numbers: Array, weights: Array) -> Array:
            return np.bincount(numbers, weights, minlength=num_classes)

        support_K, predicted_K = count(labels_N, weights_N), count(predictions_N, weights_N)
        right_K = count(labels_N[right_N], weights_N[right_N])
        there_K = support_K > 0
        precision_K = np.where(there_K, right_K / np.maximum(predicted_K, 1), np.nan)
        recall_K = np.where(there_K, right_K / np.maximum(support_K, 1), np.nan)
        f1_K = np.where(there_K, 2 * right_K / np.maximum(support_K + predicted_K, 1), np.nan)
        means_M = weights_N @ measured_NM / weights_N.sum()
        return np.concatenate([means_M, [f1_K[there_K].mean()], precision_K, recall_K, f1_K])

    return compute


def bootstrap(compute: Callable[[Array], Array], num_samples: int) -> Array:
    """Return lower and upper bounds of statistics, float64 [2, S], by resampling with replacement.

    Percentiles over `RESAMPLES` draws of as many samples as there are, the same draws at each call. A resample in
    which a statistic is NaN says nothing about it.

    Args:
        compute: takes how often each sample counts, float64 [N]; returns the statistics [S].
        num_samples: N.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13: the percentile interval.
    """
    generator = np.random.default_rng(SEED)
    drawn = []
    for _ in range(RESAMPLES):
        numbers = generator.integers(num_samples, size=num_samples)
        drawn.append(compute(np.bincount(numbers, minlength=num_samples).astype(np.float64)))
    statistics = np.stack(drawn)
    bounds = np.full((2, statistics.shape[1]), np.nan)
    known = ~np.isnan(statistics).all(axis=0)
    bounds[:, known] = np.nanquantile(statistics[:, known], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return bounds


def calibrate(probabilities_NK: Array, labels_N: Array) -> dict[str, Any]:
    """Return the expected calibration error, and of each bin of confidence that is not empty what it is made of.

    Confidence is the probability of the predicted class. The error is the mean over samples of the distance between
    the accuracy and the mean confidence of their bin.

    Source: Guo, Pleiss, Sun, Weinberger 2017, On Calibration of Modern Neural Networks.
    """
    confidence_N = probabilities_NK.max(axis=1)
    right_N = probabilities_NK.argmax(axis=1) == labels_N
    # A bin is open below and closed above, as in the source.
    bins_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    bins, error = [], 0.0
    for number in range(BINS):
        members = bins_N == number
        if members.any():
            confidence, accuracy = float(confidence_N[members].mean()), float(right_N[members].mean())
            error += abs(accuracy - confidence) * int(members.sum()) / len(labels_N)
            bins.append(
                {
                    "from": number / BINS,
                    "to": (number + 1) / BINS,
                    "samples": int(members.sum()),
                    "confidence": confidence,
                    "accuracy": accuracy,
                }
            )
    return {"ece": error, "bins": bins}
