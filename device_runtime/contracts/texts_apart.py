"""Whether an artifact's graphs can hold texts apart that lie in one sequence.

They can where each kind of block is given its attention mask (B, 1, S, S): who takes a sequence apart shuts it between texts. A
model whose blocks make their masks themselves, or mix tokens in other ways than attention, cannot.
"""

from fleetune.device_runtime.contracts.manifest import Kind, Manifest

MASK = "attention_mask"
"""The input that says which tokens are text: 0 is padding, and k is the k-th text of the sequence."""
SQUARE = ("batch", 1, "seq", "seq")


def holds_apart(manifest: Manifest) -> bool:
    """Whether texts of one sequence need not see each other."""
    has_mask = any(row.name == MASK for row in manifest.features)
    return manifest.backend == "onnx" and has_mask and all(map(_is_masked, manifest.kinds))


def _is_masked(kind: Kind) -> bool:
    shapes = {port.shape for port in kind.graphs["forward"].inputs if port.role == "side"}
    return SQUARE in shapes and ("batch", "seq") not in shapes
