"""What an operator decides: the job, its privacy and members, how patient the aggregator is, and the work that follows."""
