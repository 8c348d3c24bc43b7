-- Removes entries of a version that the namespace has left, a slice at a time. ARGV: channel, that version, how many.
-- Answers how many keys were looked at.
local space, limit = ARGV[2], tonumber(ARGV[3])
if space == redis.call('GET', base .. ':meta') then return 0 end
local index = base .. ':i:v' .. space
local keys = redis.call('ZRANGE', index, 0, limit - 1)
for _, key in ipairs(keys) do redis.call('UNLINK', entry_key(key, space)) end
if #keys > 0 then redis.call('ZREM', index, unpack(keys)) end
return #keys
