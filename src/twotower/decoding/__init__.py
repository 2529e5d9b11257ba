"""The five decoding modes, each a pure `step`, and the loop that drives them."""
