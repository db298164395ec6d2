"""Salient-weight AWQ with the array interface of Metal Marlin."""
