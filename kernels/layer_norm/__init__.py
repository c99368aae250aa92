"""LayerNorm with row-wise FP8 output; its backward with the residual's gradient. A part of `kernels.stu`."""
