"""Compiles training steps for devices that are not here: memory, traffic, and best speed."""
