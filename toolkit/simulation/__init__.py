"""Many virtual devices on one machine, under a virtual clock."""
