"""Server side of MQTT: the aggregator service, its rounds and strategies, and MQTT servers."""
