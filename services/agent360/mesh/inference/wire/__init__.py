"""The contract's messages as domain values and back; nothing else here knows protobuf."""
