"""The commands: each a thin skin over a function of the same name, imported when it is called."""
