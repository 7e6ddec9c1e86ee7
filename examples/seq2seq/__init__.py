"""Letters put in order by an encoder-decoder."""
