"""flash-attention's operators, as far as other programs import them, in plain torch."""
