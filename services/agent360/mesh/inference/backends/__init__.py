"""Model servers behind the port ``Backend``."""
