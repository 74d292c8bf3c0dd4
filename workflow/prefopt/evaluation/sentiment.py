"""A sentiment classifier: bag of words, logistic regression, kept as plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prefopt.errors import BadInput
from prefopt.files import read_json, write_json

CLASSIFIER = "classifier.json"


@dataclass(frozen=True)
class Classifier:
    """p(positive | text) = 1 / (1 + exp(-(b + sum_v w_v n_v))), n_v how often word v stands in the text.

    Words are separated by white space; those outside the vocabulary count nothing.
    """

    vocabulary: tuple[str, ...]
    weights: tuple[float, ...]  # log-odds per occurrence
    intercept: float  # log-odds of a text without known words

    def positive(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Probability of positive sentiment [N], in (0, 1) up to rounding; an empty text has that of the intercept."""
        weight = dict(zip(self.vocabulary, self.weights, strict=True))
        logits = [self.intercept + sum(weight.get(word, 0.0) for word in text.split()) for text in texts]
        return np.exp(-np.logaddexp(0.0, -np.array(logits, dtype=float)))

    def save(self, folder: Path) -> None:
        """Write classifier.json into a folder; equal classifiers give equal bytes."""
        content = {"vocabulary": self.vocabulary, "weights": self.weights, "intercept": self.intercept}
        write_json(folder / CLASSIFIER, content)


def fit_classifier(positive: Sequence[str], negative: Sequence[str], *, inverse_ridge: float = 1.0) -> Classifier:
    """Fit on texts of both classes; deterministic.

    Minimises 1/2 |w|^2 + inverse_ridge * sum over texts of log(1 + exp(-+ logit)), the intercept free. The vocabulary
    is every word of the texts, sorted.

    Raises BadInput where a class has no text, or no text has a word.
    """
    for name, texts in (("positive", positive), ("negative", negative)):
        if not texts:
            raise BadInput(f"classifier: no {name} texts to fit on; give at least one of each class")
    texts = [*positive, *negative]
    vocabulary = tuple(sorted({word for text in texts for word in text.split()}))
    if not vocabulary:
        raise BadInput(f"classifier: all {len(texts)} texts are empty; there is no word to fit")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    counts = CountVectorizer(vocabulary=vocabulary, analyzer=str.split).transform(texts)
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    model = LogisticRegression(C=inverse_ridge, max_iter=1000, tol=1e-8).fit(counts, labels)
    return Classifier(vocabulary, tuple(model.coef_[0].tolist()), float(model.intercept_[0]))


def load_classifier(folder: Path) -> Classifier:
    """The classifier that ``save`` wrote; BadInput where the file is missing or no such classifier."""
    content = read_json(folder / CLASSIFIER)
    try:
        vocabulary = tuple(str(word) for word in content["vocabulary"])
        weights = tuple(float(weight) for weight in content["weights"])
        intercept = float(content["intercept"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder / CLASSIFIER}: no classifier ({error!r}); remove the folder and run again") from None
    if len(vocabulary) != len(weights):
        raise BadInput(f"{folder / CLASSIFIER}: {len(vocabulary)} words, {len(weights)} weights; run again")
    return Classifier(vocabulary, weights, intercept)
