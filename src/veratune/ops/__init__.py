"""VeRA's mathematics on tensors: pure functions of x, A, B, d and b.

Symbols, the same in every file: T is any number of leading dimensions, n = in_features, m =
out_features, r = rank. A (r, n) and B (m, r) are frozen. d (r,) and b (m,) are trained; None stands
for a vector of ones. `scale` is the factor s of the basis. Products run in the dtype of x, or of
autocast where it is on.
"""
