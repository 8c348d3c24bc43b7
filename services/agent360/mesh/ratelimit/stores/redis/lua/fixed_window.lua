-- The twin of FixedWindow. State: start, end, used.
function definitions.f()
  local A = {}

  function A.new() return {0, 0, 0} end

  local function window(c, at)
    local n = #c
    if n < 7 then
      local start = floor(at / c[4]) * c[4]
      return start, start + c[4]
    end
    for i = 6, n - 1 do
      if at < c[i + 1] then return c[i], c[i + 1] end
    end
    -- Later than any that were told: as long as the last of them.
    local length = c[n] - c[n - 1]
    local start = c[n] + floor((at - c[n]) / length) * length
    return start, start + length
  end

  local function turn(s, c)
    if s[1] > now then catch_up(s[1]) end
    if s[1] <= now and now < s[2] then return end
    local start, stop = window(c, now)
    if start < s[1] and s[3] > 0 then
      local next_start, next_stop = window(c, stop)
      if s[1] > next_start then
        s[1] = next_start
        s[2] = next_stop
        s.moved = true
      end
      return
    end
    s[1] = start
    s[2] = stop
    s[3] = 0
    s.moved = true
  end

  function A.room(s, c)
    turn(s, c)
    return c[3] - s[3]
  end

  function A.take(s, c, hits)
    turn(s, c)
    s[3] = s[3] + hits
    return s[1]
  end

  function A.give_back(s, c, hits, mark)
    turn(s, c)
    if mark == s[1] then s[3] = max(0, s[3] - hits) end
  end

  function A.wait(s, c, hits)
    if hits > c[3] then return nil end
    if hits <= A.room(s, c) then return 0 end
    return s[2] - now
  end

  function A.reset(s, c)
    turn(s, c)
    if s[3] == 0 then return 0 end
    return s[2] - now
  end

  function A.lease_us(s, c)
    turn(s, c)
    return s[2] - now
  end

  function A.keep_us(s) return s[2] - now end

  return A
end
