"""The store of many machines: Apache Cassandra, or what speaks its protocol.

``opening.open_cassandra`` makes the ports of a URL. The driver is imported by the modules that use
it: a service on another store needs none.

Which of two writes of measurements wins is decided by what they say, never by a clock: each has a
timestamp that is computed from its content, so that a repetition, late or from another process,
changes nothing or completes what was begun.
"""
