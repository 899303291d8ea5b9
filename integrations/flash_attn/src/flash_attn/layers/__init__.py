"""flash-attention's layers, as far as other programs import them: rotary."""
