"""A fleet as an operator sees it: from what devices and aggregator say on the wire to a table, a page and metrics."""
