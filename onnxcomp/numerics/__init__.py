"""Arithmetic on numpy arrays, free of graphs and runtimes: affine codes, histograms, ranges."""
