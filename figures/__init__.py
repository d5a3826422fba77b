"""The evaluation: one script per figure, run as `python -m figures.NAME`, and the metrics and baselines that they share."""
