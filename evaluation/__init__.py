"""Evaluation of policies: simulators, demonstrations, open loop, closed loop, grounding, figures.

Nothing is imported here, and nothing in this package imports from the rest of WallVLA, so that it can be loaded under
another name in a process where `wallvla` cannot be imported (see `worker.py`). Import the module you need.
"""
