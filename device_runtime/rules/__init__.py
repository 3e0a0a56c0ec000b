"""When a device may work: rules, sensors, and the gate between steps."""
