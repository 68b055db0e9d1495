"""Calibration data: what items may be, what is made of them, and what is refused."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ovshim.errors import CalibrationError
from ovshim.precision.calibration import Misfit, Samples, collect
from ovshim.signature import flatten_call, kind_of


class Net(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return x * scale if mask is None else x * mask * scale


def samples(source: Any, *args: Any, transform: Any = None, **kwargs: Any) -> Samples:
    """What becomes of a source, for calls like `net(*args, **kwargs)`."""
    kind = kind_of(*flatten_call(args, kwargs))
    return collect(source, transform, Net().forward, args, kwargs, kind)


def equal(found: Samples, *expected: tuple[Tensor, ...]) -> bool:
    pairs = list(zip(found.tensors, expected, strict=True))
    return all(torch.equal(a, b) for mine, other in pairs for a, b in zip(mine, other, strict=True))


X = torch.arange(24.0).reshape(4, 6)
MASK = torch.ones(4, 6)
LABELS = torch.arange(4)


class Indexed(Dataset[Any]):
    """Has a length and no iterator; never raises IndexError."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index % 4], int(LABELS[index % 4])


@pytest.mark.parametrize(
    "source",
    [
        pytest.param([X], id="tensor"),
        pytest.param([(X,)], id="tuple"),
        pytest.param([X.numpy()], id="numpy"),
        pytest.param([(X, LABELS)], id="tuple with labels"),
        pytest.param([[X, LABELS]], id="list with labels"),
        pytest.param([{"x": X}], id="by name"),
        pytest.param([{"labels": LABELS, "x": X, "id": ["a"]}], id="by name with labels"),
        pytest.param(DataLoader(TensorDataset(X, LABELS), batch_size=4), id="loader"),
        pytest.param(({"x": batch} for batch in [X]), id="generator"),
    ],
)
def test_items(source: Any) -> None:
    assert equal(samples(source, X), (X,))


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(TensorDataset(X, LABELS), id="tensors"),
        pytest.param(Indexed(), id="indexed"),
        pytest.param(list(X), id="list"),
    ],
)
def test_items_of_a_dataset_get_the_dimension_of_the_batch(source: Any) -> None:
    assert equal(samples(source, X), *((row[None],) for row in X))


def test_a_transform_takes_the_inputs_out() -> None:
    found = samples([{"image": X, "label": 3}], X, transform=lambda item: item["image"])
    assert equal(found, (X,))


def test_names_fill_what_the_example_gave_by_position_and_by_name() -> None:
    items = [{"mask": MASK * 2, "x": X + 1, "labels": LABELS}]
    assert equal(samples(items, X, MASK), (X + 1, MASK * 2))
    assert equal(samples(items, X, mask=MASK), (X + 1, MASK * 2))
    assert equal(samples(items, mask=MASK, x=X), (MASK * 2, X + 1))  # the order of a call's leaves


def test_a_constant_that_items_leave_out_is_the_examples() -> None:
    assert equal(samples([{"x": X}], X, None, 2.0), (X,))
    assert equal(samples([X], x=X), (X,))


def test_one_tensor_at_two_places() -> None:
    assert equal(samples([{"x": X, "mask": MASK}], X, X), (X, X))


def test_copies_are_kept() -> None:
    given = X.clone()
    found = samples([given], X)
    given.zero_()
    assert equal(found, (X,))


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(X.double(), id="dtype"),
        pytest.param(X[None, None], id="rank"),
        pytest.param((), id="nothing"),
        pytest.param({"image": X}, id="another name"),
        pytest.param({"x": [X]}, id="structure"),
        pytest.param({"x": 3}, id="a number for a tensor"),
    ],
)
def test_items_that_are_other_calls(item: Any) -> None:
    with pytest.raises(Misfit) as caught:
        samples([item], X)
    assert "transform=" in caught.value.remedy


def test_another_constant_is_another_call() -> None:
    with pytest.raises(Misfit):
        samples([{"x": X, "scale": 3.0}], X, None, 2.0)


def test_items_in_no_form() -> None:
    with pytest.raises(CalibrationError) as caught:
        samples(["a.png"], X)
    assert not isinstance(caught.value, Misfit)


def test_a_source_without_items() -> None:
    with pytest.raises(CalibrationError):
        samples(TensorDataset(X[:0]), X)


def test_a_source_or_a_transform_that_raises() -> None:
    def items() -> Iterator[Tensor]:
        yield X
        raise FileNotFoundError("b.png")

    with pytest.raises(CalibrationError, match=r"b\.png") as caught:
        samples(items(), X)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(CalibrationError, match="KeyError"):
        samples([{"x": X}], X, transform=lambda item: item["image"])


def test_the_digest_is_of_all_bytes_in_order() -> None:
    digests = [
        samples(source, X).digest
        for source in ([X, X + 1], [X + 1, X], [X], [X, X + 1, X], [X.reshape(8, 3), X + 1])
    ]
    assert len(set(digests)) == len(digests)
    assert samples([X, X + 1], X).digest == digests[0]


def test_samples_held_out_are_not_learned_from() -> None:
    for count in (2, 4, 5, 9, 10, 300):
        found = samples([X + n for n in range(count)], X)
        assert set(found.held_out) | set(found.learned_from) == set(range(count))
        assert not set(found.held_out) & set(found.learned_from)
        assert 1 <= len(found.held_out) <= 32


def test_a_single_sample_is_both() -> None:
    found = samples([X], X)
    assert found.held_out == found.learned_from == [0]


def test_no_more_than_are_needed_are_read() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield X

    assert len(samples(endless(), X).tensors) == 300


def test_a_shuffling_loader_leaves_the_random_state_alone() -> None:
    loader = DataLoader(TensorDataset(X), batch_size=2, shuffle=True)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    samples(loader, X)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
