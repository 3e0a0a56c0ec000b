"""MQTT servers: one embedded in Python for trials, and the configuration of a real Mosquitto."""
