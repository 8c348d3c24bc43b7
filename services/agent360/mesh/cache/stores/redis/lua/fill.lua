-- Stores what a claim was for. ARGV: channel, key, nonce, refused ('1': the claim ends and nothing is kept), keep_ms, ttl_us,
-- tags, body.
-- Answers {namespace version, now, valid (0 or 1), version}: of the entry now in place, 0 if there is none.
local key, nonce, refused = ARGV[2], ARGV[3], ARGV[4] == '1'
local keep_ms, ttl_us, tags, body = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7], ARGV[8]
local now = clock()
local space = space_version(now)
local holder, began = claim_of(key, now)
local valid = nonce ~= '' and holder == nonce
local previous = last_version()
if valid and #tags > 0 then
  for _, tag in ipairs(cmsgpack.unpack(tags)) do
    local void = redis.call('HGET', base .. ':x', tag)
    if void and tonumber(void) > began then valid = false end
  end
  if not valid then
    redis.call('HDEL', base .. ':c', key)
    publish('c', previous, previous, 0, space, {key, nonce})
  end
end
if not valid then
  return {space, text(now), 0, text(head_of(entry_key(key, space)) or 0)}
end
redis.call('HDEL', base .. ':c', key)
local version = math.max(previous, now - 1) + 1
save_version(version)
if refused then
  redis.call('UNLINK', entry_key(key, space))
else
  put(space, version, now, key, keep_ms, ttl_us, tags, body)
  local index = base .. ':i:v' .. space
  keep_at_least(index, keep_ms)
  keep_versions(keep_ms)
  tidy(index, space, 4)
end
publish('k', previous, version, version, space, {key, version})
return {space, text(now), 1, refused and '0' or text(version)}
