"""Real-time inference: the whole policy call as one CUDA graph, and the same function without a graph elsewhere."""

from .engine import WallVLAEngine


__all__ = ["WallVLAEngine"]
