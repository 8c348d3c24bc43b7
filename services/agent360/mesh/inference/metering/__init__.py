"""What requests are charged: set aside before, settled after, written down."""
