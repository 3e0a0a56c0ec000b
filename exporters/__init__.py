"""Graphs: joint forward/backward programs of plain torch modules as training artifacts."""
