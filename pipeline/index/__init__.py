"""The items that a model can recommend, in one folder with the model's weights.

model + sequences + item table → catalogue, popularity, vectors → model/index/ → search
"""
