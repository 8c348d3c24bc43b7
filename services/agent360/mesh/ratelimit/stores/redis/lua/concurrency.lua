-- The twin of SlotPool. A count is a sorted set with a member for each slot, HOLDER#NUMBER, by when it comes back, and one member
-- more, SEEN, by minus the time when it was last asked for, or a little earlier.
local SEEN = '@'
local SEEN_US = 100000
function definitions.c()
  local A = {}

  local function expire(key)
    local score = redis.call('ZSCORE', key, SEEN)
    if not score then return end
    local seen = -score
    if seen > now then catch_up(seen) end
    if seen > now then
      local ahead, rows = seen - now, redis.call('ZRANGE', key, 1, -1, 'WITHSCORES')
      for i = 1, #rows, 2 do redis.call('ZADD', key, rows[i + 1] - ahead, rows[i]) end
    end
    if seen > now or now - seen > SEEN_US then redis.call('ZADD', key, -now, SEEN) end
    redis.call('ZREMRANGEBYSCORE', key, '(0', now)
  end

  function A.room(key, c)
    expire(key)
    return c[3] - max(0, redis.call('ZCARD', key) - 1)
  end

  local function keep(key)
    redis.call('ZADD', key, -now, SEEN)
    local last = redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')
    redis.call('PEXPIRE', key, max(1, ceil((last[2] - now) / 1000)) + SPARE_MS)
  end

  function A.hold(key, holder, slots, ttl_us)
    for i = 1, slots do redis.call('ZADD', key, now + ttl_us, holder .. '#' .. i) end
    keep(key)
  end

  function A.renew(key, holder, slots, ttl_us)
    expire(key)
    if not redis.call('ZSCORE', key, holder .. '#1') then return false end
    for i = 1, slots do redis.call('ZADD', key, 'XX', now + ttl_us, holder .. '#' .. i) end
    keep(key)
    return true
  end

  function A.release(key, holder, slots)
    expire(key)
    local removed = 0
    for i = 1, slots do removed = removed + redis.call('ZREM', key, holder .. '#' .. i) end
    return removed > 0
  end

  function A.wait(key, c, slots)
    if slots > c[3] then return nil end
    local missing = slots - A.room(key, c)
    if missing <= 0 then return 0 end
    local row = redis.call('ZRANGE', key, missing, missing, 'WITHSCORES')
    if row[2] then return row[2] - now end
    return nil
  end

  function A.reset(key)
    local last = redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')
    if last[2] and last[1] ~= SEEN then return max(0, last[2] - now) end
    return 0
  end

  return A
end
