"""Typed face of the native module; csrc/bindings_*.cpp is the other side."""
