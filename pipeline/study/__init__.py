"""A scaling study: encoders × sizes × lengths of history, what each costs and how good it is.

plan.py      preset and YAML → the points
point.py     one of them: its FLOP before it is run, its training, its scores
running.py   all of them on Ray, the largest size last, after it was predicted
laws.py      lines and laws through them, with intervals
entropy.py   how much the sequences hold that can be learned
figures.py   what all of it comes to, as plain values
page.py      and as one HTML page
"""
