"""A search for settings: trials drawn from a space, over a cluster, the worse ones ended early.

space.py    preset and YAML → the trials
tuning.py   Ray Tune, and ASHA, over them
trial.py    one of them, a training of one process
tracked.py  each as a child run of the search's own run
results.py  what came of them, the best as a preset
page.py     and as one HTML page
"""
