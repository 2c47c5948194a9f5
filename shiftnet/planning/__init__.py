"""Training steps compiled for devices that are not here: memory, traffic, speed at best."""
