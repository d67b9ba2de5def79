"""What a run minimises, one file per kind: its section of the recipe, its data, its loss, its held-out measure.

A file registers itself; a new kind takes no other edit. The files import torch inside of functions, because a recipe is
validated by their sections.
"""
