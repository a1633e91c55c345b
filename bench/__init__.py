"""Developers' benchmarks; what users tune with will live in `liveavatar_engine.bench`."""
