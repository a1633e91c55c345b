"""The benchmark that users tune with: `python -m liveavatar_engine.bench --help`, docs/tuning.md.

A suite measures one thing and returns `Run`s; what is shown on screen, written as JSON and drawn as HTML is made of
these alone. Nothing here needs a download, a media library or a GPU; what a CPU measured is labelled as such.
"""
