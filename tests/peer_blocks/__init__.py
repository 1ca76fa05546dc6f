"""Blocks as people paste them from blogs and papers' repositories, restated: the class, attribute and parameter names are the originals'.

Several packages use one name for different blocks, hence a module for each.
"""
