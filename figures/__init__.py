"""The evaluation: one script per figure, run as `python -m figures.NAME`, and what they share."""
import os

os.environ["MPLBACKEND"] = "agg"        # draw into files, whatever a notebook asks for
