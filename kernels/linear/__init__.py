"""Linear layer with its neighbours fused: bias, SiLU and its slope, residual, row-wise FP8.

A part of `kernels.stu`.
"""
