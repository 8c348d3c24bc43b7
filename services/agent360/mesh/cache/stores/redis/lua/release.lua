-- A filler gives its claim up. ARGV: channel, key, nonce, for how long an entry that is there stands in before loading is tried
-- again (milliseconds; 0: it does not), and how long after its end an entry may do so (microseconds).
-- Answers {namespace version, now, released (0 or 1), entry}; the entry is empty where none stands in.
local key, nonce, pause_ms, fail_safe_us = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local now = clock()
local space = redis.call('GET', base .. ':meta')
if nonce == '' or claim_of(key, now) ~= nonce then return {space, text(now), 0, ''} end
local value = false
local version, written, ttl = head_of(entry_key(key, space or ''))
if version and pause_ms > 0 and now < written + ttl + fail_safe_us then
  value = redis.call('GET', entry_key(key, space or ''))
end
if value then
  set_claim(key, '', last_version(), now + pause_ms * 1000, 1, now)
else
  redis.call('HDEL', base .. ':c', key)
end
local last = last_version()
publish('c', last, last, 0, space or '0', {key, nonce})
return {space, text(now), 1, value or ''}
