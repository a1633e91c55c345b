"""Inference engine for Live Avatar."""
