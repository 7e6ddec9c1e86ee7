"""Which responses people, and judges, prefer: a web page over a database, and what is learnt from them."""
