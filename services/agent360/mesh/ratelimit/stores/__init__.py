"""Where counts are kept that replicas share."""
