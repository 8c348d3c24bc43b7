-- The twin of SlotPool. A count is a sorted set with a member for each slot, HOLDER#NUMBER, by when it comes back.
local pools = {}

function pools.room(key, c)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  return c[3] - redis.call('ZCARD', key)
end

local function keep(key)
  local last = redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')
  if last[2] then redis.call('PEXPIRE', key, max(1, ceil((last[2] - now) / 1000)) + SPARE_MS) end
end

function pools.hold(key, holder, slots, ttl_us)
  for i = 1, slots do redis.call('ZADD', key, now + ttl_us, holder .. '#' .. i) end
  keep(key)
end

function pools.renew(key, holder, slots, ttl_us)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  if not redis.call('ZSCORE', key, holder .. '#1') then return false end
  for i = 1, slots do redis.call('ZADD', key, 'XX', now + ttl_us, holder .. '#' .. i) end
  keep(key)
  return true
end

function pools.release(key, holder, slots)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  local removed = 0
  for i = 1, slots do removed = removed + redis.call('ZREM', key, holder .. '#' .. i) end
  return removed > 0
end

function pools.wait(key, c, slots)
  if slots > c[3] then return nil end
  local missing = slots - pools.room(key, c)
  if missing <= 0 then return 0 end
  local row = redis.call('ZRANGE', key, missing - 1, missing - 1, 'WITHSCORES')
  if row[2] then return row[2] - now end
  return nil
end

function pools.reset(key)
  local last = redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')
  if last[2] then return max(0, last[2] - now) end
  return 0
end
