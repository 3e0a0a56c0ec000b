"""What a device is asked to do, one function a module: train, predict, device, inspect, selfcheck."""
