"""Host side: models in, adapters out, and the command line.

Every command is a function in the module of its name: ``fleetune.toolkit.export.export``, ``fleetune.toolkit.merge.merge``,
``fleetune.toolkit.demo.demo``.
"""
