-- Reads entries or gives out the right to fill them. ARGV: channel, then for each: key, nonce, timeout (milliseconds), and the
-- version of a fresh entry that is to be refreshed early ('': none is).
-- Answers {namespace version, last version, {1, entry} fresh | {2, remaining (microseconds), failed (0 or 1), entry} claimed by
-- another | {3, entry} granted ...}; the entry is empty where there is none.
local now = clock()
local space = redis.call('GET', base .. ':meta')
local results = {space, text(last_version())}
for at = 2, #ARGV, 4 do
  local key, nonce, timeout_ms, early = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2]), ARGV[at + 3]
  local entry = entry_key(key, space or '')
  local version, written, ttl = head_of(entry)
  local fresh = version and now < written + ttl
  if fresh and (early == '' or version ~= tonumber(early)) then
    results[#results + 1] = {1, redis.call('GET', entry)}
  else
    local _, _, ends, failed = claim_of(key, now)
    local value = version and redis.call('GET', entry) or ''
    if ends then
      results[#results + 1] = {2, text(ends - now), failed, value}
    else
      set_claim(key, nonce, last_version(), now + timeout_ms * 1000, 0, now)
      results[#results + 1] = {3, value}
    end
  end
end
local dead = redis.call('HRANDFIELD', base .. ':c', 2)
for _, key in ipairs(dead) do
  if not claim_of(key, now) then redis.call('HDEL', base .. ':c', key) end
end
return results
