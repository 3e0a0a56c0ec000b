"""An authority of a fleet's own: it signs devices, server and aggregator, knows what it signed, and revokes."""
