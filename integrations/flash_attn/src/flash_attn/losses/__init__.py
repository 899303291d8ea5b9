"""flash-attention's losses, as far as other programs import them: cross_entropy."""
