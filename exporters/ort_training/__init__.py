"""Whole models for ONNX Runtime Training, one per depth."""
