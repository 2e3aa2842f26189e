"""Plotly figures, made from plain values."""
