"""A scaling study: encoders × sizes × lengths of history, what each costs and how good it is.

plan.py         preset and YAML → the points
opening.py      what would end a point, told before any begins; what a study began with
point.py        one of them: its FLOP before it is run, its training, its scores
users.py        what the NE of a point is made of, user by user
running.py      all of them on Ray, the largest size last, after it was predicted
laws.py         lines and laws through them, with intervals
entropy.py      how much the sequences hold that can be learned
measured.py     the finished points, with draws of users and seeds
predictions.py  the largest size from the smaller ones, before it is run
figures.py      what all of it comes to, as plain values
page.py         and as one HTML page
"""
