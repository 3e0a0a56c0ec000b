"""The memory of a job: on disk, or in a process; what the service has said is in it first."""
