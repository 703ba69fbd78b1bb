"""Figures of guards on labelled rows, two side by side, fitted thresholds, a page for people."""
