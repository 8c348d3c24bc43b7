"""What follows when a backend fails, stalls or is slow: retries, breakers, hedges."""
