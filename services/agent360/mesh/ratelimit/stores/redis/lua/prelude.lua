-- What all algorithms share. Each is the twin of a class in counters.py or slots.py and does the same arithmetic on whole
-- microseconds; quantities stay below 2^53, so that doubles are exact.
--
-- KEYS: the counts, then records. ARGV[1]: {counts, operations}, packed. A count is {algorithm, shadow, amount, period_us, burst,
-- boundaries...}; the boundaries are those of the calendar's windows from the one before the present one on.
--
-- Keys, BASE being PREFIX:{TAG}
--   BASE:n:...   a count
--   BASE:i       the counts of the tag, for listing; some may have expired
--   BASE:r:ID    a reservation, lease or slots
--   BASE:q:...   the reservation that a request id has made
local SLOTS = 16
local SPARE_MS = 60000
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max

local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]

local algorithms = {}
