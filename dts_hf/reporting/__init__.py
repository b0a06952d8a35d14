"""Figures, tables, model card and report of one run. This package reads run directories only, never models."""
