"""What a paper decides at the aggregator, as pure functions: strategies, selections, configurators."""
