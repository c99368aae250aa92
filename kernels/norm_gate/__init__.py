"""Norm(A) * SiLU(U) with dropout and row-wise FP8 output. A part of `kernels.stu`."""
