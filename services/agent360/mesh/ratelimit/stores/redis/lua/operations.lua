-- Carries out operations in their order, ARGV[1] being {counts, operations, version of the limits}; each count is read once, and
-- written once if it has changed. Answers the packed list of their results, and the time.
--
-- {'d', hits, partial, counts}                 decide
-- {'m', hits, counts, times}                   decide the same so many times; {allowed, room before, tightest, reset_us, retry_us,
--                                              denier, its reset_us, its room before}; not in part, and not in shadow mode
-- {'g', hits, counts, marks, charged}          give back some of the hits charged
-- {'v', tokens, counts, record, kept_ms, named, parts}
--                                              reserve; named: the record may be there, as its name was made from the request's id
-- {'x', record}                                withdraw a reservation that another slot has denied
-- {'s', record, tokens, counts}                settle; counts: by key, those that have changed
-- {'l', tokens, counts, record, ttl_us}        lease
-- {'b', record, unspent, counts}               return a lease; counts as of settle
-- {'a', slots, counts, record, ttl_us, id}     acquire
-- {'n', record, ttl_us}                        renew; -1: as acquired
-- {'f', record}                                release
--
-- A decision is {allowed, granted, remaining, tightest, reset_us, retry_us, marks, denied}; tightest is the position of a count in
-- the operation's list; retry_us: -1 none, -2 never; denied: positions of what denied or, in shadow mode, would have. One that was
-- made before goes on with the tightest count's key and most hits at once: the list may have changed.
--
-- Records: {tokens, settled, charges, version, attempts, decision} of a reservation, {tokens, ends, charges, version} of a lease,
-- {slots, ttl_us, charges, id} of slots; charges is a list of {key, count, mark}.
local request = cmsgpack.unpack(ARGV[1])
local counts, operations, version = request[1], request[2], request[3]
local loaded, counted, dirty = {}, {}, {}

local function base_of(key) return string.sub(key, 1, string.find(key, '}', 1, true)) end

local function state_of(key, c)
  local s = loaded[key]
  if s then return s end
  local raw = redis.call('GET', key)
  if raw then
    s = cmsgpack.unpack(raw)
  else
    s = algorithms[c[1]].new()
    s.fresh = true
  end
  loaded[key] = s
  counted[key] = c
  return s
end

local function touch(key) dirty[key] = true end

local function index(key, keep_ms)
  local all = base_of(key) .. ':i'
  redis.call('ZADD', all, now, key)
  redis.call('ZREMRANGEBYRANK', all, 0, -10001)
  if redis.call('PTTL', all) < keep_ms then redis.call('PEXPIRE', all, keep_ms) end
end

local function save()
  for key, s in pairs(loaded) do
    if dirty[key] or (s.moved and not s.fresh) then
      local c = counted[key]
      local keep_ms = max(0, ceil(algorithms[c[1]].keep_us(s, c) / 1000)) + SPARE_MS
      if s.fresh then index(key, keep_ms) end
      s.fresh, s.moved = nil, nil
      redis.call('SET', key, cmsgpack.pack(s), 'PX', keep_ms)
    end
  end
end

-- room, wait and reset of any count
local function room_of(i)
  local c, key = counts[i], KEYS[i]
  if c[1] == 'c' then return algorithms.c.room(key, c) end
  return algorithms[c[1]].room(state_of(key, c), c)
end

local function wait_of(i, hits)
  local c, key = counts[i], KEYS[i]
  if c[1] == 'c' then return algorithms.c.wait(key, c, hits) end
  return algorithms[c[1]].wait(state_of(key, c), c, hits)
end

local function reset_of(i)
  local c, key = counts[i], KEYS[i]
  if c[1] == 'c' then return algorithms.c.reset(key) end
  return algorithms[c[1]].reset(state_of(key, c), c)
end

-- Decides; charge(i, granted) charges one count and returns its mark.
local function decide(hits, partial, which, charge)
  local tightest, least, shadow, rooms, denied = 1, nil, 1, {}, {}
  for n, i in ipairs(which) do
    local room, tried = room_of(i), counts[i][2]
    rooms[n] = room
    if not least or tried < shadow or (tried == shadow and room < least) then tightest, least, shadow = n, room, tried end
    if tried == 1 and room < hits then denied[#denied + 1] = n end
  end
  local granted = 0
  if shadow == 1 or least >= hits then granted = hits elseif partial then granted = max(0, least) end
  local allowed = granted > 0
  if hits == 0 then allowed = shadow == 1 or least > 0 end
  local marks, retry = {}, -1
  if allowed and granted > 0 then
    for n, i in ipairs(which) do marks[n] = charge(i, granted) end
  end
  if not allowed or granted < hits then
    local needed, longest = max(1, hits), 0
    if partial then needed = 1 end
    for n, i in ipairs(which) do
      if counts[i][2] == 0 then
        local wait = wait_of(i, needed)
        if not wait then
          longest, tightest = -2, n
          break
        end
        if wait > longest then longest, tightest = wait, n end
      end
    end
    retry, least = longest, rooms[tightest]
    if hits > 0 then denied[#denied + 1] = tightest end
  end
  return {allowed and 1 or 0, granted, max(0, least - granted), tightest, reset_of(which[tightest]), retry, marks, denied}
end

local function charge_rate(i, granted)
  local c, key = counts[i], KEYS[i]
  touch(key)
  return algorithms[c[1]].take(state_of(key, c), c, granted)
end

local run = {}

function run.d(op) return decide(op[2], op[3] == 1, op[4], charge_rate) end

function run.m(op)
  local hits, which, times = op[2], op[3], op[4]
  local tightest, least
  local rooms = {}
  for n, i in ipairs(which) do
    local room = room_of(i)
    rooms[n] = room
    if not least or room < least then tightest, least = n, room end
  end
  local fit = max(0, min(times, floor(least / hits)))
  if fit > 0 then
    for _, i in ipairs(which) do charge_rate(i, fit * hits) end
  end
  local retry, denier = -1, tightest
  if fit < times then
    retry = 0
    for n, i in ipairs(which) do
      local wait = wait_of(i, hits)
      if not wait then
        retry, denier = -2, n
        break
      end
      if wait > retry then retry, denier = wait, n end
    end
  end
  return {fit, least, tightest, reset_of(which[tightest]), retry, denier, reset_of(which[denier]), rooms[denier]}
end

function run.g(op)
  for n, i in ipairs(op[3]) do
    local c, key = counts[i], KEYS[i]
    algorithms[c[1]].give_back(state_of(key, c), c, op[2], op[4][n], op[5])
    touch(key)
  end
  return {}
end

-- Defines the operations on records; see prelude.lua.
local function define_the_others()
  local function charged(which, marks)
    local rows = {}
    for n, i in ipairs(which) do rows[n] = {KEYS[i], counts[i], marks[n]} end
    return rows
  end

  local function adjust(rows, adjustment, tokens)
    for _, row in ipairs(rows) do
      local key, c, mark = row[1], row[2], row[3]
      local s = state_of(key, c)
      if adjustment > 0 then
        algorithms[c[1]].take(s, c, adjustment)
      elseif adjustment < 0 then
        algorithms[c[1]].give_back(s, c, -adjustment, mark, tokens)
      end
      touch(key)
    end
  end

  -- The counts of several tenants among those of a record, and when they were charged; nil if there are none.
  local function shared_of(rows)
    local found
    for _, row in ipairs(rows) do
      local key, c, at = row[1], row[2], row[3]
      if string.find(key, ':{~', 1, true) then
        if c[1] == 's' then at = at * ceil(c[4] / SLOTS) end
        found = found or {}
        found[#found + 1] = {key, at}
      end
    end
    return found
  end

  local function put(key, record, keep_ms) redis.call('SET', key, cmsgpack.pack(record), 'PX', max(1, keep_ms)) end

  local function get(key)
    local raw = redis.call('GET', key)
    return raw and cmsgpack.unpack(raw)
  end

  function run.v(op)
    local key, parts = KEYS[op[4]], op[7]
    local record = op[6] == 1 and get(key)
    if record then
      if parts > 1 then
        record[5] = record[5] + 1
        put(key, record, redis.call('PTTL', key))
      end
      return record[6]
    end
    local decision = decide(op[2], false, op[3], charge_rate)
    if decision[1] == 1 then
      local known = 0
      if op[6] == 1 then
        local i = op[3][decision[4]]
        known = {unpack(decision)}
        known[9] = KEYS[i]
        known[10] = counts[i][5] or counts[i][3]
      end
      put(key, {op[2], 0, charged(op[3], decision[7]), version, 1, known}, op[5])
    end
    return decision
  end

  -- The record stays while an attempt of the same request that was not denied may rely on it.
  function run.x(op)
    local key = KEYS[op[2]]
    local record = get(key)
    if not record then return 0 end
    record[5] = record[5] - 1
    if record[5] > 0 or record[2] == 1 then
      put(key, record, redis.call('PTTL', key))
    else
      adjust(record[3], -record[1], record[1])
      redis.call('DEL', key)
    end
    return 1
  end

  -- The keys of a record's counts, if their limits may have changed since it was made, or their calendar's windows are not known so
  -- late; nil otherwise. Where the operation tells of them (a map of counts by key), they are taken over.
  local function outdated(record, told)
    if told then
      for _, row in ipairs(record[3]) do row[2] = told[row[1]] or row[2] end
      record[4] = version
      return nil
    end
    local stale = record[4] ~= version
    for _, row in ipairs(record[3]) do
      local c = row[2]
      if #c > 6 and now >= c[#c] then stale = true end
    end
    if not stale then return nil end
    local keys = {}
    for n, row in ipairs(record[3]) do keys[n] = row[1] end
    return keys
  end

  function run.s(op)
    local key = KEYS[op[2]]
    local record = get(key)
    if not record then return {-1, 0, 0} end
    local stale = outdated(record, op[4])
    if stale then return {-2, stale} end
    local adjustment, repeated = 0, record[2] == 1
    if not repeated then
      adjustment = op[3] - record[1]
      adjust(record[3], adjustment, record[1])
      record[2] = 1
      put(key, record, redis.call('PTTL', key))
    end
    local least
    for _, row in ipairs(record[3]) do
      local c = row[2]
      if c[2] == 0 then
        local room = algorithms[c[1]].room(state_of(row[1], c), c)
        if not least or room < least then least = room end
      end
    end
    return {repeated and 1 or 0, adjustment, max(0, least or 0), adjustment ~= 0 and shared_of(record[3]) or nil}
  end

  function run.l(op)
    local least
    for _, i in ipairs(op[3]) do
      if counts[i][2] == 0 then
        local room = room_of(i)
        if not least or room < least then least = room end
      end
    end
    local wanted = op[2]
    if least then wanted = min(wanted, max(1, floor(least / 4))) end
    local decision = decide(wanted, false, op[3], charge_rate)
    if decision[1] == 0 then return {decision, 0} end
    local ttl_us = op[5]
    for _, i in ipairs(op[3]) do
      local c = counts[i]
      local spendable = algorithms[c[1]].lease_us(state_of(KEYS[i], c), c)
      if spendable then ttl_us = min(ttl_us, spendable) end
    end
    local kept_us = ttl_us + op[5]
    put(KEYS[op[4]], {wanted, now + kept_us, charged(op[3], decision[7]), version}, ceil(kept_us / 1000))
    return {decision, ttl_us}
  end

  function run.b(op)
    local key = KEYS[op[2]]
    local record = get(key)
    if not record then return 0 end
    if now >= record[2] then
      redis.call('DEL', key)
      return 0
    end
    local stale = outdated(record, op[4])
    if stale then return {-2, stale} end
    redis.call('DEL', key)
    local returned = min(op[3], record[1])
    adjust(record[3], -returned, record[1])
    return {returned, -returned, 0, shared_of(record[3])}
  end

  function run.a(op)
    local ttl_us, id = op[5], op[6]
    local decision = decide(op[2], false, op[3], function(i, granted)
      local key = KEYS[i]
      if redis.call('ZCARD', key) <= 1 then index(key, ceil(ttl_us / 1000) + SPARE_MS) end
      algorithms.c.hold(key, id, granted, ttl_us)
      return 0
    end)
    if decision[1] == 1 then
      put(KEYS[op[4]], {op[2], ttl_us, charged(op[3], decision[7]), id}, ceil(ttl_us / 1000) + SPARE_MS)
    end
    return decision
  end

  function run.n(op)
    local key = KEYS[op[2]]
    local record = get(key)
    if not record then return -1 end
    local ttl_us, all = op[3], true
    if ttl_us < 0 then ttl_us = record[2] end
    for _, row in ipairs(record[3]) do
      if not algorithms.c.renew(row[1], record[4], record[1], ttl_us) then all = false end
    end
    if not all then return -1 end
    put(key, record, ceil(ttl_us / 1000) + SPARE_MS)
    return ttl_us
  end

  function run.f(op)
    local key = KEYS[op[2]]
    local record = get(key)
    if not record then return 0 end
    redis.call('DEL', key)
    local all = 1
    for _, row in ipairs(record[3]) do
      if not algorithms.c.release(row[1], record[4], record[1]) then all = 0 end
    end
    return all
  end
end

local results = {}
for n, op in ipairs(operations) do
  if not run[op[1]] then define_the_others() end
  results[n] = run[op[1]](op)
end
save()
results[#results + 1] = now
return cmsgpack.pack(results)
