"""The Lua scripts of the session record: each is one atomic compare-and-set; together they are the fence of ownership.

Owns: which keys and fields a write touches, and under which condition. Must not know: what the fields mean.
All scripts take the keys meta, tokens, origins, log_probs of one session (one hash slot) and return {status, number}.
"""

from __future__ import annotations

OK = 0
MISSING = 1
"""No such session, or its record expired."""
STALE = 2
"""Another owner, or another lease_epoch, holds the session."""
WRONG_LEN = 3
"""The stored tokens are not those that the writer builds upon; the number is their count."""
CLOSED = 4
"""A tombstone stands where the session was."""
LOST = 5
"""The writer owns the session, but what is stored is older than what it wrote: the server has lost data."""

_EXPIRE = """
local function touch(seconds)
  for i = 1, 4 do redis.call('EXPIRE', KEYS[i], seconds) end
end
"""

ACQUIRE = (
    _EXPIRE
    + """
-- ARGV: owner_id, expected lease_epoch ('' = no record), least lease_epoch, idle seconds,
--       tokens expected ('' = any), tokens kept, tokens appended, origins appended,
--       log-prob bytes kept, log-probs appended, then fields and values.
local stored = redis.call('HMGET', KEYS[1], 'closed', 'lease_epoch')
if stored[1] then return {4, 0} end
if (stored[2] or '') ~= ARGV[2] then return {2, 0} end
local num_stored = redis.call('STRLEN', KEYS[2]) / 4
local kept, log_probs_kept = tonumber(ARGV[6]), tonumber(ARGV[9])
if num_stored < kept or (ARGV[5] ~= '' and num_stored ~= tonumber(ARGV[5])) then return {3, num_stored} end
local now = redis.call('TIME')
local now_ms = tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
local epoch = math.max((tonumber(stored[2] or '0')) + 1, tonumber(ARGV[3]), now_ms)

local function cut(key, bytes)
  if bytes == 0 then redis.call('DEL', key)
  elseif redis.call('STRLEN', key) > bytes then redis.call('SET', key, redis.call('GETRANGE', key, 0, bytes - 1)) end
end
cut(KEYS[2], kept * 4)
cut(KEYS[3], kept)
cut(KEYS[4], log_probs_kept)
redis.call('APPEND', KEYS[2], ARGV[7])
redis.call('APPEND', KEYS[3], ARGV[8])
if #ARGV[10] > 0 then redis.call('APPEND', KEYS[4], ARGV[10]) end
redis.call('HDEL', KEYS[1], 'finish_reason', 'statistics', 'reply')
redis.call('HSET', KEYS[1], 'owner_id', ARGV[1], 'lease_epoch', string.format('%.0f', epoch), 'running', '1')
for i = 11, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
touch(ARGV[4])
return {0, epoch}
"""
)

COMMIT = (
    _EXPIRE
    + """
-- ARGV: owner_id, lease_epoch, stored length, idle seconds, tokens, origins, log-probs, then fields and values.
-- What is stored already of these tokens (an answer was lost, and more tokens followed) is left as it is.
--    stored      [ ........ start ..... bytes )
--    ARGV[5]              [ start .............. stop )
local stored = redis.call('HMGET', KEYS[1], 'closed', 'owner_id', 'lease_epoch')
if stored[1] then return {4, 0} end
if not stored[2] then return {5, 0} end
if tonumber(stored[3]) < tonumber(ARGV[2]) then return {5, 0} end
if stored[2] ~= ARGV[1] or stored[3] ~= ARGV[2] then return {2, 0} end
local start, bytes = tonumber(ARGV[3]) * 4, redis.call('STRLEN', KEYS[2])
local stop = start + #ARGV[5]
if bytes < start then return {5, bytes / 4} end
if bytes > start then
  local known = math.min(bytes, stop) - start
  if known == 0 or redis.call('GETRANGE', KEYS[2], start, start + known - 1) ~= string.sub(ARGV[5], 1, known) then
    return {3, bytes / 4}
  end
end
if stop > bytes then
  local num_known, row = (bytes - start) / 4, #ARGV[7] / (#ARGV[5] / 4)
  redis.call('APPEND', KEYS[2], string.sub(ARGV[5], num_known * 4 + 1))
  redis.call('APPEND', KEYS[3], string.sub(ARGV[6], num_known + 1))
  if row > 0 then redis.call('APPEND', KEYS[4], string.sub(ARGV[7], num_known * row + 1)) end
end
for i = 8, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
touch(ARGV[4])
return {0, stop / 4}
"""
)

RESTORE = (
    _EXPIRE
    + """
-- ARGV: owner_id, lease_epoch, idle seconds, tokens, origins, log-probs, then fields and values.
-- An epoch is granted by storing it: one that is older than the writer's, or its own, can only stand there because the
-- server has lost what came later. A newer one means a newer owner.
local stored = redis.call('HMGET', KEYS[1], 'closed', 'owner_id', 'lease_epoch')
if stored[1] then return {4, 0} end
if stored[3] then
  local mine, theirs = tonumber(ARGV[2]), tonumber(stored[3])
  if theirs > mine or (theirs == mine and stored[2] ~= ARGV[1]) then return {2, 0} end
end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
redis.call('SET', KEYS[2], ARGV[4])
redis.call('SET', KEYS[3], ARGV[5])
if #ARGV[6] > 0 then redis.call('SET', KEYS[4], ARGV[6]) end
redis.call('HSET', KEYS[1], 'owner_id', ARGV[1], 'lease_epoch', ARGV[2])
for i = 7, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
touch(ARGV[3])
return {0, #ARGV[4] / 4}
"""
)

FENCE = """
-- ARGV: owner_id, expected lease_epoch. Takes a running generation from its owner and leaves its tokens as they are.
local stored = redis.call('HMGET', KEYS[1], 'closed', 'lease_epoch', 'finish_reason')
if stored[1] then return {4, 0} end
if stored[2] ~= ARGV[2] then return {2, 0} end
if stored[3] then return {0, 0} end
local epoch = tonumber(stored[2]) + 1
redis.call('HSET', KEYS[1], 'owner_id', ARGV[1], 'lease_epoch', string.format('%.0f', epoch))
return {0, epoch}
"""

CLOSE = """
-- ARGV: tombstone seconds, owner key, the owner key of records that name none.
local stored = redis.call('HMGET', KEYS[1], 'closed', 'lease_epoch', 'owner_key')
if not stored[2] or (stored[3] or ARGV[3]) ~= ARGV[2] then return {1, 0} end
if stored[1] then return {0, 0} end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
redis.call('HSET', KEYS[1], 'closed', '1', 'lease_epoch', string.format('%.0f', tonumber(stored[2]) + 1),
  'owner_key', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[1])
return {0, 0}
"""
