-- The twin of TokenBucket. State: at, debt, since, fastest.
function definitions.t()
  local A = {}

  function A.new() return {0, 0, 0, 0} end

  local function left(s, c)
    if s[1] > now then catch_up(s[1]) end
    local elapsed = now - s[1]
    if elapsed >= 0 then return max(0, s[2] - elapsed * c[3]) end
    s[1] = now
    s.moved = true
    return s[2]
  end

  local function flow(s, c)
    s[2] = left(s, c)
    s[1] = now
    if s[2] == 0 then
      s[3] = now
      s[4] = c[3]
    elseif c[3] > s[4] then
      s[4] = c[3]
    end
  end

  function A.room(s, c)
    return floor((c[5] * c[4] - left(s, c)) / c[4])
  end

  function A.take(s, c, hits)
    flow(s, c)
    s[2] = s[2] + hits * c[4]
    return now
  end

  -- All that flowed since the charge, at the fastest, counts as its own: too little may be given back, never too much.
  function A.give_back(s, c, hits, mark, charged)
    flow(s, c)
    if now < mark or mark < s[3] then return end
    local undone = min(hits * c[4], charged * c[4] - (now - mark) * s[4])
    if undone > 0 then s[2] = max(0, s[2] - undone) end
  end

  function A.wait(s, c, hits)
    if hits > c[5] then return nil end
    local over = left(s, c) - (c[5] - hits) * c[4]
    if over > 0 then return ceil(over / c[3]) end
    return 0
  end

  function A.reset(s, c)
    return ceil(left(s, c) / c[3])
  end

  function A.lease_us() return nil end

  function A.keep_us(s, c) return ceil(s[2] / c[3]) end

  return A
end
