"""The tiny artifact with its adapter named as PEFT names a LoRA: ``down`` (4, 16) is an A, ``up`` (16, 4) a B, four of each."""

import hashlib
import json
import shutil
import struct
from pathlib import Path

from paths import DATA
from safetensors.numpy import load_file, save_file

PREFIX = "base_model.model."


def renamed(name):
    """The name in this artifact of a tensor of the tiny one's adapter."""
    if ".down." not in name and ".up." not in name:
        return name
    return PREFIX + name.replace(".down.", ".dense.lora_A.").replace(".up.", ".dense.lora_B.")


def lora_artifact(folder: Path) -> Path:
    """Make it in ``folder``."""
    shutil.copytree(DATA / "tiny_artifact", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "adapter.safetensors"
    save_file({renamed(name): value for name, value in load_file(path).items()}, path)
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    for row in manifest["tensors"]:
        if row["file"] == "adapter":
            row["name"] = renamed(row["name"])
            row["offset"] = 8 + size + header[row["name"]]["data_offsets"][0]
    digest = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    manifest["files"]["adapter.safetensors"] = digest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
