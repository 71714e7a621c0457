"""Published checkpoints into this layout and back, and what a checkpoint is."""

from .composition import compose
from .converter import Options, convert
from .exporter import export
from .inspection import inspect, inspection_text


__all__ = ["Options", "compose", "convert", "export", "inspect", "inspection_text"]
