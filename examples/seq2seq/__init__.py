"""Encoder-decoders that have seen letters sorted badly, and learn from a score to sort them."""
