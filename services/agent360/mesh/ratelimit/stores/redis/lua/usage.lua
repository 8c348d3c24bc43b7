-- Usage of counts as all replicas have seen it, beside the counts themselves.
--
-- KEYS: the counts. ARGV[1]: {counts, rows, clustered}, packed; a count as in prelude.lua. A row to add is {count, tenant, period_start,
-- period_us, denied, peak, charged, highest, keep_ms}, highest being the most that charged was meanwhile; the tenant is '' where the
-- count is of one tenant, and nobody's share. A row to read is {count, tenant, period_start}; answered by
-- {room, reset_us, denied, peak, charged, held}.
--
-- Keys
--   BASE:u:...          of a count, a hash: w the start of the period that p and c are of, d denied, p peak, c charged
--   BASE:s:TENANT:...   the same of a tenant's share of a count of several tenants
--   BASE:j:TENANT       the counts that the tenant has a share of, for listing; some may have expired
local request = cmsgpack.unpack(ARGV[1])
local counts, rows, clustered = request[1], request[2], request[3] == 1
local used, results = {}, {}

local function base_of(key) return string.sub(key, 1, string.find(key, '}', 1, true)) end

local function name_of(key) return string.sub(key, #base_of(key) + 4) end

local function stats_of(key, tenant)
  if tenant == '' then return base_of(key) .. ':u:' .. name_of(key) end
  return base_of(key) .. ':s:' .. tenant .. ':' .. name_of(key)
end

local function whole(number) return string.format('%.0f', number) end

local function read(stats)
  local row = redis.call('HMGET', stats, 'w', 'd', 'p', 'c')
  return tonumber(row[1] or 0), tonumber(row[2] or 0), tonumber(row[3] or 0), tonumber(row[4] or 0)
end

-- What is used of a count now, and what of it is left.
local function look(i)
  local c, key = counts[i], KEYS[i]
  if c[1] == 'c' then return algorithms.c.room(key, c), algorithms.c.reset(key), c[3] end
  local raw = redis.call('GET', key)
  local A = algorithms[c[1]]
  local s = raw and cmsgpack.unpack(raw) or A.new()
  return A.room(s, c), A.reset(s, c), c[1] == 't' and c[5] or c[3]
end

local function used_of(i)
  if not used[i] then
    local room, _, size = look(i)
    used[i] = size - room
  end
  return used[i]
end

-- Adds to one row; a replica may tell what it gave back before another tells what it had charged. A row of an earlier period came late: only what it denied counts;
-- far earlier: the clock was set back.
local function add(stats, row, peak, charged, highest)
  local start, period_us, denied, keep_ms = row[3], row[4], row[5], row[9]
  local w, _, p, c = read(stats)
  if denied > 0 then redis.call('HINCRBY', stats, 'd', denied) end
  if start ~= w and (start > w or w - start > 2 * period_us) then
    w, p, c = start, 0, 0
  elseif start < w then
    peak, charged, highest = 0, 0, 0
  end
  if highest > 0 then peak = max(peak, c + highest) end
  c = c + charged
  redis.call('HSET', stats, 'w', whole(w), 'p', whole(max(p, peak)), 'c', whole(c))
  redis.call('PEXPIRE', stats, keep_ms)
end

-- How many slots of a pool a tenant holds: those whose record is the tenant's.
local function held_of(key, tenant)
  local prefix, held = string.match(key, '^(.-){'), 0
  for _, member in ipairs(redis.call('ZRANGE', key, 0, -1)) do
    local holder = string.match(member, '^(.*)#%d+$')
    if holder then
      local tags = {string.sub(base_of(key), #prefix + 2, -2)}
      if not clustered then
        tags = {tenant}
        for tag in string.gmatch(holder, '~[^~]+') do tags[#tags + 1] = tag end
      end
      local mine = 0
      for _, tag in ipairs(tags) do
        mine = max(mine, redis.call('EXISTS', prefix .. '{' .. tag .. '}:r:' .. tenant .. ':' .. holder))
      end
      held = held + mine
    end
  end
  return held
end

local function add_row(row)
  local i, tenant = row[1], row[2]
  local key = KEYS[i]
  add(stats_of(key, ''), row, max(row[6], used_of(i)), 0, 0)
  if tenant == '' then return end
  local held = 0
  if counts[i][1] == 'c' then held = held_of(key, tenant) end
  add(stats_of(key, tenant), row, held, row[7], row[8])
  local index = base_of(key) .. ':j:' .. tenant
  redis.call('ZADD', index, now, key)
  redis.call('ZREMRANGEBYRANK', index, 0, -10001)
  if redis.call('PTTL', index) < row[9] then redis.call('PEXPIRE', index, row[9]) end
end

for n, row in ipairs(rows) do
  if row[4] then
    add_row(row)
  else
    local i, tenant = row[1], row[2]
    local room, reset_us = look(i)
    local w, d, p, c = read(stats_of(KEYS[i], tenant))
    if w ~= row[3] then p, c = 0, 0 end
    local held = 0
    if tenant ~= '' and counts[i][1] == 'c' then held = held_of(KEYS[i], tenant) end
    results[n] = {room, reset_us, d, p, max(0, c), held}
  end
end
return cmsgpack.pack(results)
