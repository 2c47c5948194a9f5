"""Trained networks for use in Python."""

from shiftnet.inference.classifier import Classifier, Predictions
from shiftnet.inference.preprocessing import ImageLike, Preprocessing

__all__ = ["Classifier", "ImageLike", "Predictions", "Preprocessing"]
