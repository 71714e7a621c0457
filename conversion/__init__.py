"""Published checkpoints into this layout and back, and what a checkpoint is."""

from .converter import Options, convert
from .exporter import export
from .inspection import inspect, inspection_text


__all__ = ["Options", "convert", "export", "inspect", "inspection_text"]
