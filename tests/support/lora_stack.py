"""The little model of ``device_runtime/conftest.py`` with a LoRA pair of rank 4 in the place of each layer's matrix."""

from fleetune.device_runtime.contracts.manifest import Tensor

WIDTH, RANK = 8, 4


def a_of(layer):
    return f"base_model.model.layer.{layer}.dense.lora_A.weight"


def b_of(layer):
    return f"base_model.model.layer.{layer}.dense.lora_B.weight"


def lora_manifest(make_manifest, num_layers=3):
    """A manifest of the pairs and of a head (8, 3)."""
    shapes = {a_of: (RANK, WIDTH), b_of: (WIDTH, RANK)}
    rows = [
        Tensor(name(i), "adapter", "float32", shape, 0, i, True)
        for i in range(num_layers)
        for name, shape in shapes.items()
    ]
    head = Tensor("head.w", "adapter", "float32", (WIDTH, 3), 0, -1, True)
    return make_manifest(num_layers, tensors=(*rows, head))


def lora_stack(linear_stack):
    """The class of stacks made of such a manifest."""

    class LoraStack(linear_stack):
        def step(self, batch, plan, adapter, **named):
            found = super().step(batch, plan, self._dense(adapter), **named)
            for i in range(len(plan)):
                if (grad := found.grads.pop(f"layer{i}.a", None)) is not None:
                    found.grads[a_of(i)] = adapter[b_of(i)].T @ grad
                    found.grads[b_of(i)] = grad @ adapter[a_of(i)].T
            return found

        def predict(self, batch, adapter):
            return super().predict(batch, self._dense(adapter))

        def _dense(self, adapter):
            layers = range(self.artifact.manifest.num_layers)
            products = {f"layer{i}.a": adapter[b_of(i)] @ adapter[a_of(i)] for i in layers}
            return {**products, "head.w": adapter["head.w"]}

    return LoraStack
