"""Graphs for ExecuTorch with XNNPACK."""
