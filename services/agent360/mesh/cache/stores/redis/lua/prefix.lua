-- Removes entries by prefix, a slice at a time. ARGV: channel, prefix, the version up to which entries go ('': a new one), last key of
-- the slice before ('': the first slice), how many keys to look at.
-- Answers {namespace version, version, removed, last key ('': that was all)}.
local prefix, upto, after, limit = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local now = clock()
local space = space_version(now)
local previous = last_version()
local new = not upto
if after == '' and redis.call('PTTL', base .. ':seq') > DAY_MS and redis.call('EXISTS', base .. ':i:v' .. space) == 0 then
  -- There are entries and no index: it was evicted. The namespace leaves what is still there.
  local version = math.max(previous, now - 1) + 1
  space = text(tonumber(space) + 1)
  redis.call('SET', base .. ':meta', space, 'KEEPTTL')
  redis.call('DEL', base .. ':c', base .. ':x')
  save_version(version)
  keep_versions(0)
  publish('a', previous, version, version, space, {})
  return {space, text(version), 0, ''}
end
if new then
  upto = math.max(previous, now - 1) + 1
  save_version(upto)
  keep_versions(0)
end
if after == '' then
  for _, key in ipairs(redis.call('HKEYS', base .. ':c')) do
    local _, began = claim_of(key, now)
    if began and began < upto and string.sub(key, 1, #prefix) == prefix then redis.call('HDEL', base .. ':c', key) end
  end
end
local index = base .. ':i:v' .. space
local from = after == '' and '[' .. prefix or '(' .. after
local keys = redis.call('ZRANGEBYLEX', index, from, '[' .. prefix .. '\255', 'LIMIT', 0, limit)
local removed = 0
for _, key in ipairs(keys) do
  local entry = entry_key(key, space)
  local version = head_of(entry)
  if not version then
    redis.call('ZREM', index, key)
  elseif version <= upto then
    redis.call('UNLINK', entry)
    redis.call('ZREM', index, key)
    removed = removed + 1
  end
end
local done = #keys < limit
if new then
  publish('p', previous, upto, upto, space, {prefix})
elseif done then
  publish('p', previous, previous, upto, space, {prefix})
end
return {space, text(upto), removed, done and '' or keys[#keys]}
