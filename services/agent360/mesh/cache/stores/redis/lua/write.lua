-- Writes entries. ARGV: channel, bump ('1': into the namespace's next version, to which it moves in the same step), count, then
-- for each: key, condition (0 always, 1 if there is no fresh entry, 2 if the version is that), wanted version, keep_ms, ttl_us,
-- tags, body.
-- Answers {namespace version, version before, now, {stored, version}...}.
local bump, count = ARGV[2] == '1', tonumber(ARGV[3])
local now = clock()
local space, old = space_version(now), nil
local previous = last_version()
local version = math.max(previous, now - 1)
if bump then
  old = space
  space = text(tonumber(space) + 1)
  redis.call('SET', base .. ':meta', space, 'KEEPTTL')
  redis.call('DEL', base .. ':c', base .. ':x')
  version = version + 1
  publish('a', previous, version, version, space, {})
  previous = version
end
local results, changed = {space, text(version), text(now)}, {}
local keep_most, at = 0, 4
for i = 1, count do
  local key, condition, wanted, keep_ms, ttl_us, tags, body =
    ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4]), ARGV[at + 5], ARGV[at + 6]
  at = at + 7
  local holds, current = true, 0
  if condition ~= '0' then
    local there, written, ttl = head_of(entry_key(key, space))
    current = there or 0
    if condition == '1' then
      holds = not there or now >= written + ttl
    else
      holds = current == wanted
    end
  end
  if holds then
    version = version + 1
    put(space, version, now, key, keep_ms, ttl_us, tags, body)
    redis.call('HDEL', base .. ':c', key)
    keep_most = math.max(keep_most, keep_ms)
    changed[#changed + 1] = key
    changed[#changed + 1] = version
    results[#results + 1] = {1, text(version)}
  else
    results[#results + 1] = {0, text(current)}
  end
end
if bump or #changed > 0 then
  save_version(version)
  keep_versions(keep_most)
end
if #changed > 0 then
  local index = base .. ':i:v' .. space
  keep_at_least(index, keep_most)
  tidy(index, space, math.min(2 * #changed, 512))
  publish('k', previous, version, version, space, changed)
end
return results
