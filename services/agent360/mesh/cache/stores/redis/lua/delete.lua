-- Removes entries by key, and takes their claims away. ARGV: channel, then the keys.
-- Answers {namespace version, version, removed (0 or 1)...}.
local now = clock()
local space = space_version(now)
local previous = last_version()
local version = math.max(previous, now - 1)
local changed, results = {}, {space, ''}
for i = 2, #ARGV do
  local key = ARGV[i]
  version = version + 1
  results[#results + 1] = redis.call('UNLINK', entry_key(key, space))
  redis.call('ZREM', base .. ':i:v' .. space, key)
  redis.call('HDEL', base .. ':c', key)
  changed[#changed + 1] = key
  changed[#changed + 1] = version
end
save_version(version)
publish('k', previous, version, version, space, changed)
results[2] = text(version)
return results
