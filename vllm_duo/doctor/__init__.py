"""Whether this machine can serve with duo, and if not, what is in the way."""
