"""From a module to programs: its parts, traced with their backward, in no backend's language."""
