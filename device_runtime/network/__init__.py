"""Connections to an MQTT server, real or in memory."""
