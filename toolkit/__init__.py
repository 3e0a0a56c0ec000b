"""Host side: models in, adapters out, and the command line.

Every command is a function in the module of its name: ``toolkit.export.export``, ``toolkit.merge.merge``,
``toolkit.demo.demo``.
"""
