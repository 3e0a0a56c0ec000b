"""What a paper decides, as pure functions over plans and tensors: layer policies and optimizers. Runs nothing itself."""
