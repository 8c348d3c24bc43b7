-- Removes entries by key, and takes their claims away. ARGV: channel, then for each: key, and the version above which its entry
-- stays ('': it does not).
-- Answers {namespace version, version, removed (0 or 1)...}.
local now = clock()
local space = space_version(now)
local previous = last_version()
local version = math.max(previous, now - 1)
local changed, results = {}, {space, ''}
for i = 2, #ARGV, 2 do
  local key, upto = ARGV[i], tonumber(ARGV[i + 1])
  local entry = entry_key(key, space)
  local there = upto and head_of(entry)
  if there and there > upto then
    results[#results + 1] = 0
  else
    version = version + 1
    results[#results + 1] = redis.call('UNLINK', entry)
    redis.call('ZREM', base .. ':i:v' .. space, key)
    redis.call('HDEL', base .. ':c', key)
    changed[#changed + 1] = key
    changed[#changed + 1] = version
  end
end
if #changed > 0 then
  save_version(version)
  keep_versions(0)
  publish('k', previous, version, version, space, changed)
end
results[2] = text(version)
return results
