"""Operations that shift networks and low-bit networks are built from, one folder each.

In a checkout this package is also the top-level folder `kernels/`.
"""
