"""Training and evaluation: the mesh, the state, the step and the loop around it."""
