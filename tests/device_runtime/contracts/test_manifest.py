"""Dimensions, inputs and the role of the labels."""

import numpy as np
import pytest

from fleetune.device_runtime.contracts.manifest import Input, extent

IDS = Input("input_ids", "int64", ("batch", "seq", 4))


@pytest.mark.parametrize(
    ("expression", "value"),
    [(7, 7), ("7", 7), ("batch", 3), ("seq", 5), ("batch*seq", 15), ("(2 * batch*seq)", 30), ("s17", 5)],
)
def test_a_dimension_has_a_value(expression, value) -> None:
    assert extent(expression, batch=3, seq=5) == value


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((2, 9, 4), "int64", True),
        ((2, 9, 5), "int64", False),
        ((3, 9, 4), "int64", False),
        ((2, 9), "int64", False),
        ((2, 9, 4), "int32", False),
    ],
)
def test_an_array_fits_by_dtype_shape_and_what_its_symbols_are_already(shape, dtype, fits) -> None:
    symbols = {"batch": 2}
    assert IDS.fits(np.zeros(shape, dtype), symbols) is fits
    if fits:
        assert symbols == {"batch": 2, "seq": 9}


def test_an_input_says_what_it_wants() -> None:
    assert str(IDS) == "int64[batch, seq, 4]"


def test_the_labels_are_the_input_of_that_role_whatever_its_name(make_manifest) -> None:
    inputs = (Input("answer", "int64", ("batch",), role="labels"), Input("labels", "int64", ("batch",)))
    manifest = make_manifest(inputs=inputs)
    assert (manifest.label_index, manifest.label_name) == (0, "answer")
    assert manifest.features == inputs[1:]
