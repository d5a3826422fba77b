"""The evaluation: one script per figure, run as `python -m figures.NAME`, and what they share."""
import os

os.environ["MPLBACKEND"] = "agg"        # draw into files, whatever a notebook asks for
os.environ["KINETO_LOG_LEVEL"] = "9"    # PyTorch's profiler is to keep quiet
