import msgspec
import pytest

from fleetune.device_runtime.contracts.class_means import ClassHead, class_head
from fleetune.device_runtime.contracts.manifest import Graph, Section, Tensor
from fleetune.device_runtime.errors import ConfigError


def head(manifest, *tensors, graphs=("predict",)):
    rows = tuple(
        Tensor(name, "adapter", "float32", shape, 0, -1, trainable) for name, shape, trainable in tensors
    )
    first = len(manifest.tensors)
    section = Section(
        {name: Graph(f"{name}.onnx", (), ()) for name in graphs}, tuple(range(first, first + len(rows)))
    )
    return msgspec.structs.replace(manifest, tensors=(*manifest.tensors, *rows), head=section)


def test_the_last_linear_of_as_many_rows_as_classes_is_found_with_its_bias(make_manifest):
    found = head(
        make_manifest(labels=("a", "b", "c")),
        ("dense.weight", (3, 3), True),
        ("dense.bias", (3,), True),
        ("classifier.weight", (3, 8), True),
        ("classifier.bias", (3,), True),
        ("other", (8, 8), True),
    )
    assert class_head(found) == ClassHead("classifier.weight", "classifier.bias")


def test_a_bias_may_be_missing_or_frozen(make_manifest):
    assert class_head(head(make_manifest(), ("score.weight", (3, 8), True))) == ClassHead("score.weight")
    frozen = head(make_manifest(), ("score.weight", (3, 8), True), ("score.bias", (3,), False))
    assert class_head(frozen) == ClassHead("score.weight")


@pytest.mark.parametrize("task", ["causal-lm", "token-classification"])
def test_a_model_of_another_task_is_refused(make_manifest, task):
    with pytest.raises(
        ConfigError, match=f"image-classification or audio-classification; this model's task is {task}"
    ):
        class_head(head(make_manifest(task=task), ("classifier.weight", (3, 8), True)))


@pytest.mark.parametrize(
    "tensors",
    [(), (("w", (8, 3), True),), (("w", (3, 8), False),), (("w", (3,), True),), (("w", (3, 8, 1), True),)],
)
def test_a_head_without_such_a_linear_is_refused(make_manifest, tensors):
    with pytest.raises(ConfigError, match="a trainable linear of 3 classes; this head has none"):
        class_head(head(make_manifest(), *tensors))


def test_a_head_that_is_no_graph_of_its_own_is_refused(make_manifest):
    with pytest.raises(ConfigError, match="this head has none"):
        class_head(head(make_manifest(), ("w", (3, 8), True), graphs=()))
