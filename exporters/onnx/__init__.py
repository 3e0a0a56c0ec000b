"""Graphs for stock onnxruntime."""
