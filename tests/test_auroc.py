"""eval.py's AUROC against scikit-learn and every pair counted."""
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from data import InputError
from eval import auroc


def brute_force(labels, scores):
    """Every pair of an anomaly and a normal image, as a fraction."""
    anomalies = [score for score, label in zip(scores, labels) if label]
    normals = [score for score, label in zip(scores, labels) if not label]
    pairs = [(a, b) for a in anomalies for b in normals]
    return Fraction(sum(2 * (a > b) + (a == b) for a, b in pairs), 2 * len(pairs))


def test_auroc_equals_scikit_learn_on_random_cases():
    rng = np.random.default_rng(0)
    for case in range(3000):
        n = int(rng.integers(2, 60))
        labels = rng.permutation(np.arange(n) < rng.integers(1, n))
        scores = (rng.normal(size=n), rng.integers(0, 4, n), np.full(n, 0.3),
                  rng.normal(size=n).astype(np.float32), rng.integers(0, 2, n) * 1e-300,
                  rng.normal(size=n) * 1e300)[case % 6]
        assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-14)


def test_auroc_is_the_exact_fraction_of_pairs():
    rng = np.random.default_rng(1)
    for n in (2, 3, 5, 17, 64):
        for scores in (rng.normal(size=n), rng.integers(0, 3, n),
                       rng.choice([-math.inf, -0.0, 0.0, math.inf], n)):
            labels = np.arange(n) % 2
            assert auroc(labels, scores) == float(brute_force(labels, scores))


def test_auroc_of_a_large_tied_sample_is_exact():
    rng = np.random.default_rng(2)
    positive = np.round(rng.normal(0.2, 1, 300_000), 2)
    negative = np.round(rng.normal(0, 1, 200_000), 2)
    negative.sort()
    below = np.searchsorted(negative, positive, "left").sum(dtype=object)
    not_above = np.searchsorted(negative, positive, "right").sum(dtype=object)
    exact = Fraction(int(below) + int(not_above), 2 * 300_000 * 200_000)
    labels = np.r_[np.ones(300_000), np.zeros(200_000)]
    assert auroc(labels, np.r_[positive, negative]) == float(exact)


def test_auroc_constants_and_separation():
    assert auroc([0, 1, 0, 1], [7, 7, 7, 7]) == 0.5
    assert auroc([False, False, True], [1, 2, 3]) == 1.0
    assert auroc([1, 0], [1, 2]) == 0.0                                       # and not flipped to 1


@given(st.lists(st.tuples(st.booleans(), st.integers(-50, 50)), min_size=2).filter(
    lambda pairs: len({label for label, _ in pairs}) == 2))
@settings(max_examples=300, deadline=None)
def test_auroc_properties(pairs):
    labels, scores = map(np.array, zip(*pairs))
    a = auroc(labels, scores)
    assert a == float(brute_force(labels, scores.tolist()))
    assert auroc(labels, scores.astype(float) ** 3 * 5 - 2) == a  # monotone: changes nothing
    assert auroc(labels, np.arctan(scores / 10)) == a
    assert auroc(~labels, scores) == pytest.approx(1 - a, abs=1e-15)
    assert auroc(labels, -scores) == pytest.approx(1 - a, abs=1e-15)
    order = np.random.default_rng(0).permutation(len(labels))
    assert auroc(labels[order], scores[order]) == a


@pytest.mark.parametrize("labels, scores, word", [
    ([0, 0], [1, 2], "both classes"), ([1, 1], [1, 2], "both classes"), ([], [], "both classes"),
    ([0, 1], [1, math.nan], "NaN"), ([0, 1, 1], [1, 2], "3 labels, 2 scores"),
    ([0, 2], [1, 2], "labels of 0"), ([0, math.nan], [1, 2], "labels of 0")])
def test_auroc_refuses(labels, scores, word):
    with pytest.raises(InputError, match=word):
        auroc(labels, scores)
