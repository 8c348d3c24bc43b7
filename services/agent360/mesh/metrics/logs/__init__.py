"""Log records of all services: kept for a while, listed."""
