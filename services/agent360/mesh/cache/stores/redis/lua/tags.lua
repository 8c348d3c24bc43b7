-- Removes entries by one tag, a slice at a time. ARGV: channel, tag, the version up to which entries go ('': a new one), cursor ('0': the
-- first slice), how many to look at, how long an open claim may last (milliseconds).
-- Answers {namespace version, version, removed, cursor ('0': that was all)}.
local tag, upto, cursor, limit = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local now = clock()
local space = space_version(now)
local previous = last_version()
local new = not upto
if new then
  upto = math.max(previous, now - 1) + 1
  save_version(upto)
  keep_versions(0)
end
if cursor == '0' then
  if redis.call('EXISTS', base .. ':c') == 1 then
    -- What open claims will be filled with may carry the tag, and would be older than this.
    redis.call('HSET', base .. ':x', tag, text(upto))
    keep_at_least(base .. ':x', tonumber(ARGV[6]))
    for _, other in ipairs(redis.call('HRANDFIELD', base .. ':x', 2)) do
      local void = tonumber(redis.call('HGET', base .. ':x', other))
      if void < now - tonumber(ARGV[6]) * 1000 then redis.call('HDEL', base .. ':x', other) end
    end
  end
end
local members = base .. ':t:' .. tag .. ':v' .. space
local scanned = redis.call('SSCAN', members, cursor, 'COUNT', limit)
local removed = 0
for _, key in ipairs(scanned[2]) do
  local entry = entry_key(key, space)
  local version, _, _, tags_length = head_of(entry)
  if not version or not has_tag(entry, tags_length, tag) then
    redis.call('SREM', members, key)
  elseif version <= upto then
    redis.call('UNLINK', entry)
    redis.call('SREM', members, key)
    redis.call('ZREM', base .. ':i:v' .. space, key)
    removed = removed + 1
  end
end
if new then
  publish('t', previous, upto, upto, space, {tag})
elseif scanned[1] == '0' then
  publish('t', previous, previous, upto, space, {tag})
end
return {space, text(upto), removed, scanned[1]}
