-- What all algorithms share. Each is the twin of a class in counters.py or slots.py and does the same arithmetic on whole
-- microseconds; exact while quantities stay below 2^53.
--
-- KEYS: the counts, then records. ARGV[1]: what is asked, packed; ARGV[2]: the time that the asking replica has known. A count is
-- {algorithm, shadow, amount, period_us, burst, boundaries...}; the boundaries are those of the calendar's windows from the one
-- before the present one on.
--
-- Keys, BASE being PREFIX:{TAG}
--   BASE:n:...   a count
--   BASE:i       the counts of the tag, for listing; some may have expired
--   BASE:r:ID    a reservation, lease or slots
--
-- The clock is Redis'. Where that was set back, time goes on as the asking replica and the counts have known it: that many
-- microseconds ahead of the clock at most. Set back by more, counts carry over what was used.
local SLOTS = 16
local SPARE_MS = 60000
local AHEAD_US = 60000000
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max

local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]

local latest = now + AHEAD_US
now = max(now, min(tonumber(ARGV[2] or 0), latest))

local function catch_up(seen)
  if seen > now and seen <= latest then now = seen end
end

-- By letter. Defining functions takes longer than a check does: those of an algorithm are defined when it is first asked for.
local definitions = {}
local algorithms = setmetatable({}, {__index = function(known, letter)
  known[letter] = definitions[letter]()
  return known[letter]
end})
