-- What all scripts share. KEYS[1] is the shard's ":meta" key; every other key is made from its base, in the same slot.
--
-- The keys of a shard, BASE being PREFIX:{TENANT:NAMESPACE:INDEX.COUNT}
--   BASE:meta          the namespace's version
--   BASE:seq           the last version given to a change; versions only grow, also when clocks step back
--   BASE:e:KEY:vN      an entry of the namespace's version N: head, tags, body
--   BASE:i:vN          all keys of version N, in lexical order (some of them may have expired)
--   BASE:t:TAG:vN      the keys that carry a tag (some may have expired or lost it)
--   BASE:c             open claims by key
--   BASE:x             tags invalidated while claims are open, with the version at which they were
--
-- The head of an entry: its version, when it was written (microseconds of this server's clock), for how long it is fresh
-- (microseconds), and the length of its tags.
--
-- ARGV[1] is the channel; ARGV[2], which is taken out here, the time after which it is too late to begin: the caller has given up
-- then, and may have done something else since.
local base = string.sub(KEYS[1], 1, -6)
local channel = ARGV[1]
local deadline = tonumber(table.remove(ARGV, 2))
local HEAD = '>I8I8I8I4'
local HEAD_BYTES = 28
-- For so long :meta and :seq outlive the last entry. What comes after them is by the clock, and above all before.
local DAY_MS = 86400000

local function clock()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

if clock() > deadline then return redis.error_reply('LATE the caller has given up') end

local function text(number)
  return string.format('%.0f', number)
end

local function entry_key(key, space)
  return base .. ':e:' .. key .. ':v' .. space
end

-- The namespace's version; one that was never used before where there is none, so that nothing old can come back.
local function space_version(now)
  local space = redis.call('GET', base .. ':meta')
  if not space then
    space = text(now)
    redis.call('SET', base .. ':meta', space, 'PX', DAY_MS)
  end
  return space
end

local function last_version()
  return tonumber(redis.call('GET', base .. ':seq') or '0')
end

local function save_version(version)
  redis.call('SET', base .. ':seq', text(version), 'KEEPTTL')
end

-- version, written, ttl, length of tags; nil where there is no entry
local function head_of(entry)
  local head = redis.call('GETRANGE', entry, 0, HEAD_BYTES - 1)
  if #head < HEAD_BYTES then return nil end
  return struct.unpack(HEAD, head)
end

local function has_tag(entry, tags_length, tag)
  if tags_length == 0 then return false end
  local tags = cmsgpack.unpack(redis.call('GETRANGE', entry, HEAD_BYTES, HEAD_BYTES + tags_length - 1))
  for _, each in ipairs(tags) do
    if each == tag then return true end
  end
  return false
end

local function keep_at_least(key, milliseconds)
  if redis.call('PTTL', key) < milliseconds then redis.call('PEXPIRE', key, milliseconds) end
end

local function keep_versions(milliseconds)
  keep_at_least(base .. ':meta', milliseconds + DAY_MS)
  keep_at_least(base .. ':seq', milliseconds + DAY_MS)
end

-- nonce, version at which it was claimed, when it ends, whether loading has failed
local function claim_of(key, now)
  local packed = redis.call('HGET', base .. ':c', key)
  if not packed then return nil end
  local claim = cmsgpack.unpack(packed)
  if now >= claim[3] then return nil end
  return claim[1], claim[2], claim[3], claim[4]
end

local function set_claim(key, nonce, began, ends, failed, now)
  redis.call('HSET', base .. ':c', key, cmsgpack.pack({nonce, began, ends, failed}))
  keep_at_least(base .. ':c', math.ceil((ends - now) / 1000))
end

-- Tells all replicas. previous and latest are the last versions given before and after, so that a lost message shows.
local function publish(kind, previous, latest, version, space, names)
  redis.call('PUBLISH', channel, cmsgpack.pack({kind, base, previous, latest, version, space, names}))
end

-- Lets go of index members whose entries have expired: four looks for each write keep them fewer than the entries.
local function tidy(index, space, looks)
  local members = redis.call('ZRANDMEMBER', index, looks)
  for _, key in ipairs(members) do
    if redis.call('EXISTS', entry_key(key, space)) == 0 then redis.call('ZREM', index, key) end
  end
end

-- Writes one entry. item: key, keep_ms, ttl_us, tags (packed), body
local function put(space, version, now, key, keep_ms, ttl_us, tags, body)
  local head = struct.pack(HEAD, version, now, ttl_us, #tags)
  redis.call('SET', entry_key(key, space), head .. tags .. body, 'PX', keep_ms)
  redis.call('ZADD', base .. ':i:v' .. space, 0, key)
  if #tags > 0 then
    for _, tag in ipairs(cmsgpack.unpack(tags)) do
      local members = base .. ':t:' .. tag .. ':v' .. space
      redis.call('SADD', members, key)
      keep_at_least(members, keep_ms)
      for _, other in ipairs(redis.call('SRANDMEMBER', members, 3)) do
        local entry = entry_key(other, space)
        local there, _, _, tags_length = head_of(entry)
        if not there or not has_tag(entry, tags_length, tag) then redis.call('SREM', members, other) end
      end
    end
  end
end
