"""What a device's owner allows an aggregator to ask, and what has left the device."""
