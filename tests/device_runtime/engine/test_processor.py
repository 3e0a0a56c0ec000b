"""What the kernel lists of a processor, and which of it multiplies int8."""

from pathlib import Path

import pytest

from fleetune.device_runtime.engine.processor import int8_path

ZEN_3 = "processor\t: 0\nflags\t\t: fpu sse4_1 avx2 bmi2\nbugs\t\t: none\n"
CASES = {
    ZEN_3: "avx2",
    ZEN_3.replace("avx2", "avx2 avx512f avx512bw"): "avx512",
    ZEN_3.replace("avx2", "avx2 avx_vnni"): "avx-vnni",
    ZEN_3.replace("avx2", "avx2 avx_vnni avx512bw avx512_vnni"): "avx512-vnni",
    ZEN_3.replace("avx2", "avx"): "other",
    ZEN_3.replace("avx2", "noavx2 avx512_vnni_of_another"): "other",
    "processor\t: 0\nFeatures\t: fp asimd asimdhp\n": "other",
    "processor\t: 0\nFeatures\t: fp asimd asimddp\n": "neon-dotprod",
    "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n": "neon-i8mm",
    "processor\t: 0\nFeatures\t:\nCPU revision\t: avx2\n": "other",
    "": "other",
}


@pytest.mark.parametrize(("listed", "path"), CASES.items(), ids=range(len(CASES)))
def test_the_best_that_is_listed_is_named(listed: str, path: str, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(listed)
    assert int8_path(tmp_path) == path


def test_where_nothing_is_listed_it_is_other(tmp_path: Path) -> None:
    assert int8_path(tmp_path) == "other"
