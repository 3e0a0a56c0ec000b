"""The aggregator at work: messages in, actions carried out, messages out."""
