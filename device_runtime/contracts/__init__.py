"""What devices, exporters and aggregator agree on: manifest, artifact, wire messages, codecs, plans. Knows no other room."""
