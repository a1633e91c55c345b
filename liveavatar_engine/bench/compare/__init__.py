"""The engine beside the reference: the same weights and inputs, one after the other. docs/compare.md is for users.

`suite` is what the benchmark calls, `run.run_compare` what a program calls. `reference` drives the reference's own
network, `stand_ins` and `patches` are what it needs to run here, `worker` runs one side in a process of its own.
"""
