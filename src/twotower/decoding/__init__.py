"""The five decoding modes, their settings and outputs, and the plain loop that runs them."""
