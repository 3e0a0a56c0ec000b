"""A graph that names a file, loops, calls itself or runs somebody else's operators is refused before a session is made."""

import os
import shutil
from pathlib import Path

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from fleetune.device_runtime.arrays import sha256_of
from fleetune.device_runtime.contracts.artifact import MANIFEST, open_artifact
from fleetune.device_runtime.contracts.graph_file import graph_problems
from fleetune.device_runtime.engine import onnx_graphs
from fleetune.device_runtime.errors import ArtifactError

GRAPH = "graphs/head.train.onnx"
SECRET = b"what lies outside " * 4


@pytest.fixture
def copy(word_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(word_artifact, tmp_path / "artifact"))


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onnx_graphs.ort, "InferenceSession", lambda *_, **__: pytest.fail("a session is made")
    )


def lists_anew(folder: Path) -> None:
    """The manifest with the digests of what is there now: whoever makes an artifact may write what they like."""
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))


def outside(location: str, *, named: bool = True) -> TensorProto:
    tensor = TensorProto(name="stolen", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    if named:
        tensor.external_data.add(key="location", value=location)
        tensor.external_data.add(key="length", value="16")
    return tensor


def put(folder: Path, change) -> None:
    model = onnx.load(folder / GRAPH)
    change(model)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    lists_anew(folder)


def refused(folder: Path) -> str:
    with pytest.raises(ArtifactError) as found:
        open_artifact(folder)
    with pytest.raises(ArtifactError):
        open_artifact(folder, verify=False)
    assert "\n" not in str(found.value)
    assert GRAPH in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("where", ["absolute", "parents", "link", "unlisted", "listed", "memory", "nowhere"])
def test_a_tensor_in_another_file_is_refused_wherever_that_lies(copy, tmp_path, no_session, where):
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    (copy / "graphs" / "beside").write_bytes(SECRET)
    os.symlink(secret, copy / "graphs" / "link")
    location = {
        "absolute": str(secret),
        "parents": "../../secret",
        "link": "link",
        "unlisted": "beside",
        "listed": "../base.safetensors",
        "memory": "*/_ORT_MEM_ADDR_/*",
        "nowhere": "",
    }[where]
    put(copy, lambda m: m.graph.initializer.append(outside(location, named=where != "nowhere")))
    said = refused(copy)
    assert "tensor 'stolen' lies in" in said
    assert location in said


def in_attribute(model):
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.append(helper.make_attribute("value", outside("/etc/passwd")))
    model.graph.node.append(node)


def in_sparse(model):
    sparse = model.graph.sparse_initializer.add(dims=[8])
    sparse.values.CopyFrom(outside("/etc/passwd"))


def with_odd_location(model):
    """External by a number that is cut to 32 bits, which only protobuf's own reader would call 1."""
    tensor = TensorProto(name="stolen", data_type=TensorProto.FLOAT, dims=[4])
    raw = tensor.SerializeToString() + bytes([14 << 3, 0x81, 0x80, 0x80, 0x80, 0x10])
    assert TensorProto.FromString(raw).data_location == TensorProto.EXTERNAL
    model.graph.initializer.add().MergeFromString(raw)


@pytest.mark.parametrize("change", [in_attribute, in_sparse, with_odd_location])
def test_so_is_one_in_a_node_or_a_sparse_tensor(copy, no_session, change):
    put(copy, change)
    assert "lies in" in refused(copy)


def loop(model):
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["goes_on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("goes_on", TensorProto.BOOL, [])],
    )
    model.graph.node.append(helper.make_node("Loop", ["", "true"], [], body=body))


def branches(model):
    model.graph.node.append(helper.make_node("If", ["yes"], ["x"]))
    one = model.graph.node[-1].attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
    one.g.name = "then"


def beams(model):
    model.graph.node.append(helper.make_node("Odd", [], ["x"]))
    many = model.graph.node[-1].attribute.add(name="graphs", type=onnx.AttributeProto.GRAPHS)
    many.graphs.add()


def function(model):
    model.functions.add(name="twice", domain="own")


def training(model):
    model.training_info.add()


@pytest.mark.parametrize("change", [loop, branches, beams, function, training])
def test_each_node_runs_once(copy, no_session, change):
    put(copy, change)
    assert "each node of a graph is to run once" in refused(copy)


@pytest.mark.parametrize(
    ("operator", "domain", "said"),
    [
        ("Evil", "my.own", "domain 'my.own', which nobody here runs"),
        ("Evil\x1b[2J\n", "my.own", r"node 'Evil?[2J?'"),
        ("EPContext", "com.microsoft", "'EPContext' runs what lies outside"),
        ("PythonOp", "com.microsoft", "'PythonOp' runs what lies outside"),
    ],
)
def test_operators_are_those_of_onnx_and_onnxruntime(copy, no_session, operator, domain, said):
    put(copy, lambda m: m.graph.node.append(helper.make_node(operator, [], ["x"], domain=domain)))
    assert said in refused(copy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x3b",
        b"\x3a\x05ab",
        b"\x3a" + b"\xff" * 12,
        b"\x38" + b"\x80" * 4,
        b"\x39abc",
        b"ORTM\x00\x00\x00",
    ],
    ids=repr,
)
def test_what_is_no_graph_says_so(tmp_path, content):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    assert ["is no ONNX graph" in said for said in graph_problems(path)] == [True]


@pytest.mark.parametrize("one", [b"\x0a\x00", b"\x08\x00"], ids=repr)
def test_fields_without_end_are_not_all_looked_at(tmp_path, one):
    path = tmp_path / "x.onnx"
    path.write_bytes(one * 600_000)
    assert [*graph_problems(path)] == ["is no ONNX graph (more than 400,000 fields)"]


def test_a_graph_by_another_name_is_looked_at_too(copy, no_session):
    manifest = msgspec.json.decode((copy / MANIFEST).read_bytes())
    manifest["head"]["graphs"]["train"]["file"] = "graphs/plain.txt"
    manifest["files"]["graphs/plain.txt"] = {}
    (copy / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    model = onnx.load(copy / GRAPH)
    model.graph.initializer.append(outside("/etc/passwd"))
    (copy / "graphs/plain.txt").write_bytes(model.SerializeToString())
    lists_anew(copy)
    with pytest.raises(ArtifactError, match=r"graphs/plain\.txt tensor 'stolen' lies in '/etc/passwd'"):
        open_artifact(copy)
