"""Tables that need no network: breast cancer and wine, shipped with scikit-learn."""

from __future__ import annotations

from typing import Any

import torch

from data_modules.embedded import SPLIT_SEED
from data_modules.rows import Rows
from data_modules.splits import DataModule, Split, fingerprint_tensors
from data_modules.stratify import stratified_parts
from data_modules.tables import fit_table

BUNCHES = ("breast_cancer", "wine")


def load_breast_cancer() -> DataModule:
    """Load 569 samples of breast tissue, 30 measurements of cell nuclei: malignant or benign, cut 70/15/15.

    Source: UCI "Breast Cancer Wisconsin (Diagnostic)" as shipped by scikit-learn.
    """
    return _cut_bunch("breast_cancer")


def load_wine() -> DataModule:
    """Load chemical analyses of 178 wines, 13 measurements, from three growers, cut 70/15/15.

    Source: UCI "Wine" as shipped by scikit-learn.
    """
    return _cut_bunch("wine")


def open_bunch(name: str) -> tuple[Rows, Any]:
    """Return the rows of one of BUNCHES as they are, and the bunch of scikit-learn, which has the labels."""
    import datasets
    import sklearn.datasets

    bunch = {"breast_cancer": sklearn.datasets.load_breast_cancer, "wine": sklearn.datasets.load_wine}[name]()
    columns = [str(column) for column in bunch.feature_names]
    data = datasets.Dataset.from_dict(dict(zip(columns, bunch.data.T)))
    return Rows(name, data, lambda row: f"{name}, row {row}"), bunch


def _cut_bunch(name: str) -> DataModule:
    """Return a data set of scikit-learn, cut with equal class shares and standardised by its training part."""
    rows, bunch = open_bunch(name)
    columns = rows.data.column_names
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    parts = stratified_parts(labels, (0.70, 0.15, 0.15), SPLIT_SEED)
    preprocessing, notes = fit_table(rows, parts[0], columns, ())
    samples = preprocessing.encode(rows)
    train, validation, test = (Split(samples, labels[part], part) for part in parts)
    return DataModule(
        name=name,
        fingerprint=fingerprint_tensors(*samples.tensors.values(), labels, *parts),
        inputs=preprocessing.input_spec,
        train=train,
        validation=validation,
        test=test,
        class_names=[str(label) for label in bunch.target_names],
        preprocessing=preprocessing,
        notes=notes,
    )
