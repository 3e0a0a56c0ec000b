"""Server side of MQTT: the aggregator, its rounds, strategies and ledger, and MQTT servers."""
