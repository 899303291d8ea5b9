"""Operators that flash-attention writes in Triton; here they are plain torch and need no compiler."""
