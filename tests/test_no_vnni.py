"""A processor with AVX2 and no VNNI, emulated: where two products with a uint8 are added in 16 bits.

`qemu-x86_64` (Debian's qemu-user) runs this very interpreter; onnxruntime asks the emulated processor what it can do.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import SEQUENCE, export_tiny
from paths import ROOT
from pretrained import MINILM

from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.toolkit.export import export

QEMU = shutil.which("qemu-x86_64")
PROCESSOR = "Haswell"
LIMIT_S = 1500
WITNESS = """
import numpy as np, onnx.parser, onnxruntime
text = '''<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (uint8[M,64] x, int8[64,16] w) => (float[M,16] y)
<float one = {1.0}, uint8 zero = {0}> { y = com.microsoft.MatMulIntegerToFloat (x, w, one, one, zero) }'''
session = onnxruntime.InferenceSession(onnx.parser.parse_model(text).SerializeToString())
x = np.full((3, 64), 255, np.uint8)
print([float(session.run(None, {"x": x, "w": np.full((64, 16), w, np.int8)})[0].max()) for w in (127, 65, 64)])
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="this machine is not x86-64"),
    pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64; Debian has it in qemu-user"),
]


def emulated(*words: str | Path) -> str:
    """What Python prints on that processor."""
    command = [str(QEMU), "-cpu", PROCESSOR, sys.executable, *map(str, words)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_there_int8_weights_beyond_64_saturate() -> None:
    assert json.loads(emulated("-c", WITNESS)) == [1048544, 1048544, 255 * 64 * 64]


def test_there_the_products_of_extremes_are_exact() -> None:
    emulated("-m", "pytest", "-p", "no:cacheprovider", "tests/exporters/onnx/test_passes.py", "-k", "int8")


@pytest.mark.parametrize("base_dtype", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("model", ["bert", "minilm"])
def test_there_as_here_the_golden_step_is_repeated(model: str, base_dtype: str, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    if model == "bert":
        export_tiny("bert", SEQUENCE, tmp_path, base_dtype=base_dtype)
    else:
        export(MINILM, task=SEQUENCE, num_labels=2, base_dtype=base_dtype, out=artifact)
    words = ("-m", "fleetune", "selfcheck", artifact, "--threads", "1", "--json")
    there, here = json.loads(emulated(*words).splitlines()[-1]), selfcheck(artifact)
    print(
        f"{model} {base_dtype}: there {there['max_relative_error']:.1e}, here {here.max_relative_error:.1e}"
    )
    assert there["ok"]
    assert here.ok
