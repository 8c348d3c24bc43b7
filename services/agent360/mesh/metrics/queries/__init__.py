"""Queries: what is asked, how it is read and computed, what is kept of it, and watches."""
