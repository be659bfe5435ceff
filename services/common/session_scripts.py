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

_EXPIRE = """
local function touch(seconds)
  for i = 1, 4 do redis.call('EXPIRE', KEYS[i], seconds) end
end
"""

ACQUIRE = (
    _EXPIRE
    + """
-- ARGV: owner_id, expected lease_epoch ('' = no record), least lease_epoch, idle seconds, tokens kept, tokens appended,
--       origins appended, log-prob bytes kept, log-probs appended, then fields and values.
local stored = redis.call('HMGET', KEYS[1], 'closed', 'lease_epoch')
if stored[1] then return {4, 0} end
if (stored[2] or '') ~= ARGV[2] then return {2, 0} end
local kept, log_probs_kept = tonumber(ARGV[5]), tonumber(ARGV[8])
local num_stored = redis.call('STRLEN', KEYS[2]) / 4
if num_stored < kept then return {3, num_stored} end
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
redis.call('APPEND', KEYS[2], ARGV[6])
redis.call('APPEND', KEYS[3], ARGV[7])
if #ARGV[9] > 0 then redis.call('APPEND', KEYS[4], ARGV[9]) end
redis.call('HDEL', KEYS[1], 'finish_reason', 'statistics', 'reply')
redis.call('HSET', KEYS[1], 'owner_id', ARGV[1], 'lease_epoch', string.format('%.0f', epoch), 'running', '1')
for i = 10, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
touch(ARGV[4])
return {0, epoch}
"""
)

COMMIT = (
    _EXPIRE
    + """
-- ARGV: owner_id, lease_epoch, stored length, idle seconds, tokens, origins, log-probs, then fields and values.
-- A commit that is stored already (its answer was lost) succeeds again and changes nothing but the fields.
local stored = redis.call('HMGET', KEYS[1], 'closed', 'owner_id', 'lease_epoch')
if stored[1] then return {4, 0} end
if not stored[2] then return {1, 0} end
if stored[2] ~= ARGV[1] or stored[3] ~= ARGV[2] then return {2, 0} end
local start, bytes = tonumber(ARGV[3]) * 4, redis.call('STRLEN', KEYS[2])
local stop = start + #ARGV[5]
if bytes == start then
  if stop > start then
    redis.call('APPEND', KEYS[2], ARGV[5])
    redis.call('APPEND', KEYS[3], ARGV[6])
    if #ARGV[7] > 0 then redis.call('APPEND', KEYS[4], ARGV[7]) end
  end
elseif bytes < stop or stop == start or redis.call('GETRANGE', KEYS[2], start, stop - 1) ~= ARGV[5] then
  return {3, bytes / 4}
end
for i = 8, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
touch(ARGV[4])
return {0, stop / 4}
"""
)

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
