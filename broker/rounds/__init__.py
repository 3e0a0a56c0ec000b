"""The rounds of a job as a state machine: events in, actions out; no socket, no clock, no disk."""
