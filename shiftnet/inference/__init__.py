"""Trained networks for use in Python."""

from shiftnet.inference.classifier import Classifier, Predictions

__all__ = ["Classifier", "Predictions"]
